"""Text of the repository's own files in the site: whole files as pages, sections in pages, and their links."""

import ast
import functools
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mkdocs.exceptions import PluginError

from modeling_deepseek_moe.distribution import repository_address

ROOT = Path(__file__).resolve().parents[2]
CARDS = {
    f"model_cards/reference/{path.name}": f"models/cards/{path.name}"
    for path in sorted((ROOT / "model_cards/reference").glob("*.md"))
}
# File of the repository -> page that it is.
WHOLE = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "FACTS.md": "facts.md",
    "conversion/README.md": "conversion.md",
    "modeling_deepseek_moe/README.md": "modules.md",
    "modeling_deepseek_moe/kernels/README.md": "speed/kernels.md",
    "tests/benchmarks/results/benchmark.md": "speed/benchmark.md",
    "model_cards/demo_base/README.md": "models/cards/demo-base.md",
    **CARDS,
}
# Where a link to a file or folder leads whose text is in several pages.
LINKED = {
    **WHOLE,
    "README.md": "index.md",
    "finetune/README.md": "fine-tuning/costs.md",
    "model_cards/reference": "models/index.md",
}
IMAGES = (".png", ".svg")
_LINK = re.compile(r"(?<!\\)(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
_CODE_OR_REFERENCE = re.compile(r"`[^`]*`|\]( ?)\[")
_HEADING = re.compile(r"(#{1,6}) +(.*?) *$")


class Line(NamedTuple):
    """A line of Markdown; `level` is 1 to 6 in a heading, 0 outside, and `is_code` within a fenced block."""

    text: str
    level: int
    is_code: bool


def lines_of(text: str) -> Iterator[Line]:
    fence = None
    for line in text.splitlines():
        mark = re.match(r" *(```+|~~~+)", line)
        if fence or mark:
            if fence is None:
                fence = mark[1]
            elif mark and line.strip() == fence:
                fence = None
            yield Line(line, 0, True)
        else:
            heading = _HEADING.match(line)
            yield Line(line, len(heading[1]) if heading else 0, False)


def section(file: str, title: str) -> str:
    """The text below the heading `title` of a file; without a title, what stands between its `#` and its first `##`.

    Of a module it is the docstring, what follows the first paragraph as it is laid out there.

    Raises:
        PluginError: no such file or heading; the message names the headings that there are.
    """
    if file.endswith(".py"):
        summary, _, rest = ast.get_docstring(ast.parse(read(file))).partition("\n\n")
        return f"{summary}\n\n```text\n{rest}\n```\n"
    level = None if title else 2
    found, titles = [], []
    for line in lines_of(read(file)):
        name = _HEADING.match(line.text)[2] if line.level else None
        if level and line.level and line.level <= level and (title or line.level == 2):
            break
        if name:
            titles.append(name)
        if name and name == title and not level:
            level = line.level
        elif level and not (line.level == 1 and not title):
            found.append(line.text)
    if not level:
        raise PluginError(f"{file} has no section {title!r}, which a page includes; it has {', '.join(titles)}")
    return "\n".join(found).strip() + "\n"


@functools.cache
def read(file: str) -> str:
    path = ROOT / file
    if not path.is_file():
        raise PluginError(f"{file}, which a page includes, is not in the repository")
    return path.read_text(encoding="utf-8")


def with_links(text: str, file: str, page: str) -> tuple[str, set[str]]:
    """Text of a file as it stands in a page, and the images that it shows.

    A link to a file that is a page leads there, one to another file to the repository; as long as that has no address,
    only the link's text is left.

    Raises:
        PluginError: a link leads to no file.
    """
    images: set[str] = set()

    def replaced(match: re.Match) -> str:
        mark, label, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        name, hash_mark, anchor = target.partition("#")
        found = posixpath.normpath(posixpath.join(posixpath.dirname(file), name))
        if not (ROOT / found).exists():
            raise PluginError(f"{file} links to {target}, which is not in the repository")
        if found.endswith(IMAGES):
            images.add(found)
            place = f"images/{found}"
        elif found in LINKED:
            place = LINKED[found]
        elif repository_address():
            return f"{mark}[{label}]({repository_address()}/blob/main/{found})"
        else:
            return label
        return f"{mark}[{label}]({posixpath.relpath(place, posixpath.dirname(page) or '.')}{hash_mark}{anchor})"

    def escaped(match: re.Match) -> str:
        # `[8, 4] [U]` would be a link by reference, which the repository's files do not use.
        return match[0] if match[0].startswith("`") else f"]{match[1]}\\["

    lines = [
        line.text if line.is_code else _CODE_OR_REFERENCE.sub(escaped, _LINK.sub(replaced, line.text))
        for line in lines_of(text)
    ]
    return "\n".join(lines) + "\n", images


def table_row(file: str, title: str, first: str) -> list[str]:
    """Header, rule and the row whose first cell is `first` of the table in a section; empty if it has none."""
    rows = [line for line in section(file, title).splitlines() if line.startswith("|")]
    found = [row for row in rows if row.split("|")[1].strip().strip("`") == first]
    return [*rows[:2], *found] if found else []
