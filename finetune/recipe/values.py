"""Values of recipes: reading YAML, and checking types."""

import re
import types
import typing
from typing import Any

import yaml

from ..errors import RecipeError


def read_yaml(text: str, where: str) -> Any:
    """The value that a YAML text has; a RecipeError that names `where` and the line if it is none."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}, line {mark.line + 1}" if mark else where
        raise RecipeError(f"{place}: not YAML: {getattr(error, 'problem', None) or error}") from error


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
        raise RecipeError(f"`{key}` is a list of words; {value!r} holds something else")
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
        f"`{key}` is {value!r}, {kind_of(value)}; it must be {' or '.join(wanted) or 'set from Python'}{hint}"
    )


class _Loader(yaml.SafeLoader):
    """YAML 1.2's floats (`1e-4`, which YAML 1.1 calls a string) and no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.constructor.ConstructorError(None, None, f"key {twice!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
