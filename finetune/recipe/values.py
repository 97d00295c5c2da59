"""Values of recipes: reading YAML, and checking types."""

import os
import re
import types
import typing
from pathlib import Path
from typing import Any

import yaml

from ..errors import RecipeError, first_line

_DEEPEST = 32
_MOST_BYTES = 1_000_000
# Of most file systems; a path leaves room for the names of checkpoints and their files.
_LONGEST_NAME, _LONGEST_PATH = 255, 3800
_PATHS = {"model", "data", "eval_data", "output_dir", "metric", "hub_id", "esft.experts"}
_PATHS |= {"training.logging_dir", "training.deepspeed", "training.fsdp_config", "training.accelerator_config"}


def read_yaml_file(path: Path) -> Any:
    """The value in a YAML file.

    Raises:
        RecipeError: it is not YAML that a person would write: text of no more than a megabyte, without aliases.
        OSError: it cannot be read.
    """
    if path.exists() and not path.is_file() and not path.is_dir():  # it might never end
        raise RecipeError(f"{path} is no file")
    if path.is_file() and path.stat().st_size > _MOST_BYTES:
        raise RecipeError(f"{path} has {path.stat().st_size:,} bytes, which no recipe has: name a YAML file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is no recipe: it is not UTF-8 text") from error
    return read_yaml(text, str(path))


def read_yaml(text: str, where: str) -> Any:
    """The value that a YAML text has; a RecipeError that names `where` and the line if it is none."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}, line {mark.line + 1}" if mark else where
        raise RecipeError(f"{place}: not YAML: {getattr(error, 'problem', None) or error}") from error
    # A value that is not what its tag says, or a date of no calendar; PyYAML lets them pass.
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise RecipeError(f"{where}: not YAML: a value cannot be read ({first_line(error)})") from error


def check_text(key: str, value: Any) -> None:
    """Raise a RecipeError if a value, or what is in it, is text that no file can hold, or no path can be."""
    if isinstance(value, list | dict):
        for item in [*value, *value.values()] if isinstance(value, dict) else value:
            check_text(key, item)
    if not isinstance(value, str):
        return
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise RecipeError(f"`{key}` is {value[:60]!a}, which has a character that no text may have: write it without")
    if key not in _PATHS:
        return
    if value.startswith("~"):
        try:
            Path(value).expanduser()
        except RuntimeError as error:
            raise RecipeError(f"`{key}` is {value[:60]!r}, but there is no such user: write the path out") from error
    names = os.fsencode(value).split(b"/")
    if max(map(len, names)) > _LONGEST_NAME or len(os.fsencode(value)) > _LONGEST_PATH:
        raise RecipeError(
            f"`{key}` is {value[:60]!r}... of {len(value)} characters: a name in a path has {_LONGEST_NAME} bytes at "
            f"most, and the path {_LONGEST_PATH}: give a shorter one"
        )


def kind_of(value: Any) -> str:
    """What a value is, in words: a number, text, a list."""
    names = {bool: "a truth value", int: "a number", float: "a number", str: "text", list: "a list", dict: "a mapping"}
    return "nothing" if value is None else names.get(type(value), f"a {type(value).__name__}")


def convert_value(key: str, value: Any, hint: Any, raw: str | None) -> Any:
    """`value` as the type that `hint` asks for; an int is taken for a float, a single word for a list of one."""
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    members = typing.get_args(hint) if union else (hint,)
    plain = {typing.get_origin(member) or member for member in members}
    choices = [
        choice
        for member in members
        if typing.get_origin(member) is typing.Literal
        for choice in typing.get_args(member)
    ]
    if list in plain and str not in plain and isinstance(value, str):
        value = [value]
    words = any(typing.get_origin(member) is list and typing.get_args(member) == (str,) for member in members)
    if words and isinstance(value, list) and not all(isinstance(item, str) for item in value):
        raise RecipeError(f"`{key}` is a list of words; {_shown(value)} holds something else")
    if isinstance(value, list | dict) and {list, dict} & plain and not _is_of(value, hint):
        wanted = " or ".join(str(member).replace("typing.", "") for member in members if member is not type(None))
        raise RecipeError(f"`{key}` is {_shown(value)}, which holds something else than it may: it is {wanted}")
    if Any in plain or type(value) in plain or value in choices:
        return value
    if float in plain and type(value) is int:
        return float(value)
    if str in plain and raw is not None and value is not None:
        return raw
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list"}
    names |= {dict: "a mapping", type(None): "null"}
    wanted = [name for member, name in names.items() if member in plain] + [repr(choice) for choice in choices]
    hint = " (put it in quotes)" if str in plain and not isinstance(value, list | dict) else ""
    raise RecipeError(
        f"`{key}` is {_shown(value)}, {kind_of(value)}; it must be {' or '.join(wanted) or 'set from Python'}{hint}"
    )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a value of YAML, and all that is in it, has the type that `hint` says; a pair is a list there."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, types.UnionType) or origin is typing.Union:
        return any(_is_of(value, member) for member in arguments)
    if origin is list:
        return isinstance(value, list) and all(_is_of(item, arguments[0]) for item in value)
    if origin is tuple:
        return isinstance(value, list) and len(value) == len(arguments) and all(map(_is_of, value, arguments))
    if origin is dict:
        return isinstance(value, dict) and all(_is_of(item, arguments[1]) for item in value.values())
    if hint in (int, bool, str, list, dict, type(None)):
        return type(value) is hint
    return type(value) in (int, float) if hint is float else True


class _Loader(yaml.SafeLoader):
    """YAML 1.2's floats (`1e-4`, which YAML 1.1 calls a string) and no key twice.

    Neither deep nesting nor aliases are read: a few lines of these can stand for more values than memory holds.
    """

    depth = 0  # of the node that is composed

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            problem = f"the alias *{event.anchor[:40]} is not read: write out what it stands for"
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        if self.depth == _DEEPEST:
            problem = f"more than {_DEEPEST} lists and mappings in each other"
            raise yaml.composer.ComposerError(None, None, problem, self.peek_event().start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        mapping = super().construct_mapping(node, deep)  # which refuses keys that are lists or mappings
        if len(mapping) < len(node.value):
            seen: set[Any] = set()
            keys = (self.construct_object(key, deep=True) for key, _ in node.value)
            twice = next(key for key in keys if key in seen or seen.add(key))
            raise yaml.constructor.ConstructorError(None, None, f"key {twice!r} is there twice", node.start_mark)
        return mapping


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
