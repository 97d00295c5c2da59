"""Every key that a recipe can have, with its type, its default and a line about it: what `deepseek-moe keys` shows.

Nothing is said twice: all is read from the classes whose fields the keys are, those of the package here,
`TrainingArguments`, `LoraConfig` and `DPOConfig` elsewhere. Their sources are read and not run, because importing
these libraries takes seconds, and help should not.
"""

import ast
import functools
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .sections import ALSO_CALLED, DEFAULTS, LOSSES, SECTIONS, is_key

_ENTRY = re.compile(r"^\s*(?P<names>\w+(?:, \w+)*)\s*(?:\(.*\))?:(?:\s+(?P<text>.*))?$")
# Where the sections' classes are: a package that is installed, a file in it, the class.
_HERE = "modeling_deepseek_moe.finetune.recipe"
SOURCES = {
    "": (_HERE, "schema.py", "Recipe"),
    "esft": (_HERE, "schema.py", "EsftOptions"),
    "parallel": (_HERE, "schema.py", "ParallelOptions"),
    "lora": ("peft", "tuners/lora/config.py", "LoraConfig"),
    "training": ("transformers", "training_args.py", "TrainingArguments"),
    "dpo": ("trl", "trainer/dpo_config.py", "DPOConfig"),
}
_TARGETS = "Which parts of the model get adapters, in words: attention, shared_experts, routed_experts, dense_mlp, "
_TARGETS += "router, all."


class Key(NamedTuple):
    """A key of a recipe.

    Attributes:
        name: as a recipe or the command line has it, `training.learning_rate`.
        type: of its values, as Python writes it.
        default: as Python writes it; None where the recipe has to name a value.
        line: one sentence.
    """

    name: str
    type: str
    default: str | None
    line: str


@functools.cache
def recipe_keys() -> tuple[Key, ...]:
    """All keys, the package's own first; those of a library that is not installed are left out."""
    keys = [key for key in _keys_of("") if key.name not in SECTIONS]
    keys += [Key(f"losses.{name}", kind, "the model's own", line) for name, (kind, line) in LOSSES.items()]
    keys += [*_keys_of("esft"), *_keys_of("parallel")]
    keys.append(Key("lora.targets", "list[str]", "[], for none", _TARGETS))
    for section in ("lora", "training", "dpo"):
        keys += _keys_of(section)
    return tuple(keys)


def find_keys(word: str = "") -> list[Key]:
    """Keys that have a word in their name, or are called so elsewhere; else those that have it in their line."""
    word = word.lower()
    found = [key for key in recipe_keys() if word in key.name or key.name == ALSO_CALLED.get(word)]
    return found or [key for key in recipe_keys() if word in key.line.lower()]


def _keys_of(section: str) -> list[Key]:
    prefix = f"{section}." if section else ""
    others = {key.name for key in _fields(*SOURCES["training"])} if section == "dpo" else ()  # there already
    return [
        key._replace(name=f"{prefix}{key.name}", default=repr(ours[key.name]) if key.name in ours else key.default)
        for ours in [DEFAULTS.get(section, {})]
        for key in _fields(*SOURCES[section])
        if is_key(section, key.name) and key.name not in others
    ]


@functools.cache
def _fields(package: str, file: str, name: str) -> list[Key]:
    """The fields of a dataclass by its source; none where the package is not installed."""
    found = importlib.util.find_spec(package)
    if found is None:
        return []
    tree = ast.parse((Path(found.submodule_search_locations[0]) / file).read_text("utf-8"))
    node = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    given = [item for item in node.body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)]
    lines = _lines(ast.get_docstring(node) or "", {item.target.id for item in given})
    keys = []
    for item in given:
        options = {word.arg: word.value for word in item.value.keywords} if _is_field(item.value) else {}
        if isinstance(options.get("init"), ast.Constant) and not options["init"].value:
            continue
        line = lines.get(item.target.id) or _help(options.get("metadata"))
        keys.append(Key(item.target.id, ast.unparse(item.annotation), _default(item.value, options), line))
    return keys


def _is_field(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "field"


def _default(value: ast.expr | None, options: dict[str, ast.expr]) -> str | None:
    if not _is_field(value):
        return None if value is None else ast.unparse(value)
    if "default_factory" in options:
        made = options["default_factory"]
        if isinstance(made, ast.Lambda) and _is_literal(made.body):
            return ast.unparse(made.body)
        return {"list": "[]", "dict": "{}"}.get(ast.unparse(made), "chosen by the library")
    default = options.get("default")
    return "chosen by the library" if default is None or not _is_literal(default) else ast.unparse(default)


def _is_literal(value: ast.expr) -> bool:
    try:
        ast.literal_eval(value)
    except ValueError:
        return False
    return True


def _help(metadata: ast.expr | None) -> str:
    """The text that a field's own metadata has for the command line."""
    if not isinstance(metadata, ast.Dict):
        return ""
    texts = {ast.unparse(key): value for key, value in zip(metadata.keys, metadata.values, strict=True) if key}
    help_ = texts.get("'help'")
    return _sentence(help_.value) if isinstance(help_, ast.Constant) else ""


def _lines(docstring: str, names: set[str]) -> dict[str, str]:
    """The first sentence about each field in a docstring's list of them."""
    texts: dict[str, str] = {}
    for entry, text in _entries(docstring.splitlines(), names):
        texts |= dict.fromkeys(entry, _sentence(text))
    return texts


def _entries(lines: list[str], names: set[str]) -> Iterator[tuple[list[str], str]]:
    place = 0
    while place < len(lines):
        line, place = lines[place], place + 1
        found = _ENTRY.match(line)
        entry = found["names"].split(", ") if found else []
        if not entry or not names.issuperset(entry):
            continue
        depth, text = _depth(line), [found["text"] or ""]
        while place < len(lines) and lines[place].strip() and _depth(lines[place]) > depth:
            text.append(lines[place].strip())
            place += 1
        yield entry, " ".join(text).strip()


def _depth(line: str) -> int:
    return len(line) - len(line.lstrip())


def _sentence(text: Any) -> str:
    text = " ".join(str(text).split())
    end = re.search(r"(?<!e\.g)(?<!i\.e)[.:](?= [A-Z-])", text)
    text = text[: end.start()] if end else text
    first = text[:1].upper() if text[:1].isascii() else text[:1]  # of a Greek letter nobody knows the capital
    return f"{first}{text[1:]}".rstrip(".:") + "."
