"""A page for every shipped recipe: its own text, its YAML, and its rows of the tables in finetune/README.md."""

import re

from repository import table_row

from modeling_deepseek_moe.finetune.recipe.load import SHIPPED

_TABLES = (("Memory", "Which recipe fits which GPU"), ("On the demo's base", "What each recipe learns"))


def pages() -> dict[str, str]:
    """Source path of each page -> its Markdown."""
    return {f"fine-tuning/recipes/{name}.md": recipe_page(name) for name in SHIPPED}


def recipe_page(name: str) -> str:
    header, yaml = header_and_rest(SHIPPED[name].read_text(encoding="utf-8"))
    parts = [f"# {name}", header]
    for title, section in _TABLES:
        rows = table_row("finetune/README.md", section, name)
        anchor = section.lower().replace(" ", "-")
        parts += [f"## {title}", "\n".join(rows), f"[What the columns mean](../costs.md#{anchor})"] if rows else []
    parts += ["## The file", f"```yaml\n{yaml}```", "[All keys](../../reference/recipe-keys.md)"]
    return "\n\n".join(parts) + "\n"


def header_and_rest(text: str) -> tuple[str, str]:
    """The comment on top of a YAML file as Markdown, commands in it as code; and the lines below it."""
    comment = re.match(r"(?:#.*\n)*", text)[0]
    lines, is_code = [], False
    for line in comment.splitlines():
        content = line.removeprefix("#")
        code = content.startswith("   ")
        if code != is_code:
            lines.append("\n```bash" if code else "```\n")
        lines.append(content.strip())
        is_code = code
    return "\n".join([*lines, "```"] if is_code else lines), text[len(comment) :].lstrip("\n")
