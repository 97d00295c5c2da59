"""Reference pages that follow from the code: config fields, recipe keys, the command, and the API of each package."""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterable

from mkdocs.exceptions import PluginError
from repository import ROOT

from modeling_deepseek_moe.finetune.recipe.keys import recipe_keys as keys_of_recipes
from modeling_deepseek_moe.finetune.recipe.sections import OWN_INSTEAD

CONFIG = "modeling_deepseek_moe/configuration_deepseek_moe.py"
# Page -> title, and the package whose public names it has.
API = {
    "reference/model.md": ("Model", "modeling_deepseek_moe"),
    "reference/finetune.md": ("Fine-tuning", "modeling_deepseek_moe.finetune"),
    "reference/conversion.md": ("Conversion", "modeling_deepseek_moe.conversion"),
}
# Names that another page explains.
_ELSEWHERE = {
    "ADAPTER_FORMATS": "../conversion.md#adapters",
    "FORMATS": "../conversion.md",
    "DeepseekMoeConfig": "config.md",
    "EsftOptions": "recipe-keys.md#esft",
    "ParallelOptions": "recipe-keys.md#parallel",
    "Recipe": "recipe-keys.md",
}
# Page -> title, module, and its members that are for users, if not all that have docstrings.
MODULES = {
    "reference/expert-lora.md": (
        "LoRA on experts",
        "modeling_deepseek_moe.expert_lora",
        "[register_expert_lora, load_adapter]",
    ),
    "reference/parallel-adapters.md": (
        "Adapters on spread models",
        "modeling_deepseek_moe.parallel_adapters",
        "[average_copies, save_adapter]",
    ),
    "reference/balancing.md": ("Balance losses", "modeling_deepseek_moe.balancing", "null"),
}
# What stands above the table of a section.
_OF_SECTION = {
    "losses": ["By the names of [the config's fields](config.md#balance-group)."],
    "lora": ["Fields of `peft.LoraConfig`."],
    "training": ["Fields of `transformers.TrainingArguments`."],
    "dpo": ["Fields of `trl.DPOConfig`."],
}


def pages() -> dict[str, str]:
    """Source path of each page -> its Markdown."""
    api = {page: api_of_package(*rest) for page, rest in API.items()}
    api |= {page: api_of_module(*rest) for page, rest in MODULES.items()}
    return {
        "reference/config.md": config_fields(),
        "reference/recipe-keys.md": recipe_keys(),
        "reference/command.md": command_line(),
        **api,
    }


def config_fields() -> str:
    """The fields of `DeepseekMoeConfig` with type and default, below the paragraph of its docstring that names them.

    Raises:
        PluginError: no paragraph names a field.
    """
    module = ast.parse((ROOT / CONFIG).read_text(encoding="utf-8"))
    config = next(node for node in module.body if isinstance(node, ast.ClassDef))
    fields = {node.target.id: node for node in config.body if isinstance(node, ast.AnnAssign)}
    paragraphs = [" ".join(part.split()) for part in ast.get_docstring(config).split("\n\n")]
    text, left = ["# Config fields"], fields
    for paragraph in paragraphs:
        if paragraph.startswith("Raises:"):
            continue
        group = re.match(r"([A-Z][a-z]+(?:[ -][a-z]+){0,2})(?: \([^)]*\))?: ", paragraph)
        if group:
            text.append(f"## {group[1]}")
            rest = paragraph.removeprefix(f"{group[1]}: ")
            paragraph = rest[0].upper() + rest[1:]
        text.append(paragraph)
        named = [name for name in re.findall(r"`(\w+)(?:=[^`]*)?`", paragraph) if name in left]
        rows = [(name, left.pop(name)) for name in dict.fromkeys(named)]
        text += ["\n".join(_table(("field", "type", "default"), map(_field_row, rows)))] if rows else []
    if left:
        raise PluginError(f"the docstring of DeepseekMoeConfig ({CONFIG}) explains no field {', '.join(left)}")
    return "\n\n".join(text) + "\n"


def _field_row(row: tuple[str, ast.AnnAssign]) -> tuple[str, str, str]:
    name, node = row
    return f"`{name}`", f"`{ast.unparse(node.annotation)}`", f"`{ast.unparse(node.value)}`"


def recipe_keys() -> str:
    """The keys of a recipe, section by section, with what `deepseek-moe keys` says of each."""
    keys = [(key.name.rpartition(".")[0], key) for key in keys_of_recipes()]
    parts = [
        "# Recipe keys",
        "What may stand in a recipe's YAML file, or after it on the command line as `KEY=VALUE`; `deepseek-moe keys "
        "WORD` finds one. An unknown key is an error that names the nearest. Keys of sections are written as a nested "
        "mapping, or with a dot: `lora.r=32`.",
    ]
    for section in dict.fromkeys(section for section, _ in keys):
        parts += [f"## `{section}.*`", *_OF_SECTION.get(section, [])] if section else []
        rows = [
            (f"`{key.name}`", f"`{key.type}`", "required" if key.default is None else f"`{key.default}`", key.line)
            for its_section, key in keys
            if its_section == section
        ]
        parts.append("\n".join(_table(("key", "type", "default", "what it says"), rows)))
        if section == "training":
            rows = [(f"`{key}`", f"{instead[0].upper()}{instead[1:]}.") for key, instead in OWN_INSTEAD.items()]
            parts += ["These are refused:", "\n".join(_table(("field", "instead"), rows))]
    return "\n\n".join(parts) + "\n"


def command_line() -> str:
    """The help of every verb."""
    command = [sys.executable, "-m", "typer", "modeling_deepseek_moe.cli.main", "utils", "docs"]
    done = subprocess.run([*command, "--name", "deepseek-moe"], capture_output=True, text=True)
    if done.returncode:
        raise PluginError(f"the command's help could not be read: {done.stderr.strip()}")
    text, lines = done.stdout.replace("# `deepseek-moe`\n", "# Command line\n", 1), []
    verb = ""
    for line in text.splitlines():
        heading, listed = re.match(r"##+ `deepseek-moe (.*)`", line), re.match(r"\* `(\w+)`: ", line)
        verb = heading[1] if heading else verb
        if listed and (name := f"{verb} {listed[1]}".strip()) and f"# `deepseek-moe {name}`" in text:
            # What typer says of a verb in a list is cut off; its own section has all of it.
            line = f"* [`{listed[1]}`](#deepseek-moe-{name.replace(' ', '-')})"
        lines.append(line)
    return "\n".join(lines) + "\n"


def api_of_module(title: str, module: str, members: str) -> str:
    """The docstring of a module, and of what stands in it."""
    options = ["show_root_heading: false", "show_root_toc_entry: false", f"members: {members}"]
    return f"# {title}\n\n::: {module}\n    options:\n" + "".join(f"      {option}\n" for option in options)


def api_of_package(title: str, package: str) -> str:
    """The public names of a package, each read from the docstring of where it stands."""
    homes = importlib.import_module(package)._HOMES
    links = [f"[`{name}`]({_ELSEWHERE[name]})" for name in homes if name in _ELSEWHERE]
    parts = [f"# {title}", f"What `{package}` hands out by name."]
    parts += [f"On pages of their own: {', '.join(links)}."] if links else []
    for name, home in homes.items():
        options = [f"      heading: {package}.{name}", f"      toc_label: {name}"]
        if name in _ELSEWHERE and name != "DeepseekMoeConfig":
            continue
        if name in _ELSEWHERE:  # its methods stand here
            options += ["      show_docstring_description: false"]
        parts.append("\n".join([f"::: {package}{home}.{name}", "    options:", *options]))
    return "\n\n".join(parts) + "\n"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows)]
