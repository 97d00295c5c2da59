"""Recipes: a flat YAML file, `key=value` overrides from the command line, one frozen dataclass.

Keys of two libraries pass through by their own names: `lora.*` to `peft.LoraConfig` (plus `lora.targets`, the words of
`model/lora.py`) and `training.*` to `transformers.TrainingArguments`, written dotted or as a nested mapping.
Nothing is dropped in silence: an unknown key is an error that names the nearest known one.
"""

import dataclasses
import difflib
import os
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from ..errors import RecipeError, nearest
from .checks import check_recipe
from .ranges import check_number
from .schema import Recipe
from .sections import ALSO_CALLED, OWN_INSTEAD, SECTIONS, section_hints
from .values import check_text, convert_value, kind_of, read_yaml, read_yaml_file

RUN_RECIPE = "recipe.yaml"  # in a run's folder
_OF_THE_DEMO = "demo"  # on its own base and rows
SHIPPED = {
    path.stem: path
    for path in sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
    if path.stem != _OF_THE_DEMO
}


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe from a file, and check it.

    Args:
        path: a YAML file, the name of a shipped recipe (`lora_all`), or the folder of a run, whose recipe it is; its
            `output_dir` is then that folder, wherever it has moved.
        overrides: `key=value` strings that win over the file; values are YAML.

    Raises:
        RecipeError: the file is missing or not a YAML mapping, or a key or a value is wrong.
    """
    try:
        file = recipe_file(path)
        values = read_yaml_file(file)
    except OSError as error:
        close = difflib.get_close_matches(str(path), SHIPPED, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise RecipeError(
            f"cannot read recipe {str(path)[:200]}: {error.strerror}{hint} (shipped recipes: {', '.join(SHIPPED)})"
        ) from error
    if not isinstance(values, dict):
        raise RecipeError(f"{file} is not a recipe: it holds {kind_of(values)}, not `key: value` lines")
    if file.name == RUN_RECIPE and (folder := Path(path).expanduser()) == file.parent:
        values["output_dir"] = str(folder)
    raw = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise RecipeError(f"{override[:100]!r} is not of the form key=value, such as output_dir=runs/first")
        raw[key] = value
    return make_recipe({**_flat(values), **_flat({key: read_yaml(value, key) for key, value in raw.items()})}, raw)


def recipe_file(name: str | Path) -> Path:
    """The file of a recipe: a path, the name of a shipped recipe, or the folder of a run."""
    path = Path(name).expanduser()
    if path.is_dir() and (path / RUN_RECIPE).is_file():
        return path / RUN_RECIPE
    return path if path.is_file() else SHIPPED.get(str(name).removesuffix(".yaml"), path)


def make_recipe(values: Mapping[str, Any], raw: Mapping[str, str] | None = None) -> Recipe:
    """Check values and build a recipe from them.

    Args:
        values: recipe keys (those of a section dotted or nested) and their values.
        raw: text of the keys that came from the command line, which a string key takes as it stands.

    Raises:
        RecipeError: as `load_recipe`.
    """
    own = typing.get_type_hints(Recipe)
    flat = _flat(values)
    sections = section_hints({key.partition(".")[0] for key in map(str, flat)})
    known = {key: hint for key, hint in own.items() if key not in SECTIONS}
    known |= {f"{section}.{key}": hint for section, hints in sections.items() for key, hint in hints.items()}
    fields: dict[str, Any] = {section: {} for section in SECTIONS}
    for key, value in flat.items():
        section, _, name = str(key).partition(".")
        if section == "training" and name in OWN_INSTEAD:
            raise RecipeError(f"`{key}` is not a recipe key: {OWN_INSTEAD[name]}")
        if key not in known:
            name = str(key)[:100]
            meant = ALSO_CALLED.get(name.rpartition(".")[2], nearest(name, known))
            raise RecipeError(f"unknown recipe key `{name}`: did you mean `{meant}`?")
        target = fields[section] if section in SECTIONS else fields
        value = convert_value(key, value, known[key], (raw or {}).get(key))
        check_text(key, value)
        check_number(key, value)
        # `~` is the home in every path: no name, number or word begins with it.
        target[name if section in SECTIONS else key] = os.path.expanduser(value) if isinstance(value, str) else value
    required = [item.name for item in dataclasses.fields(Recipe) if item.default is item.default_factory]
    if missing := [name for name in required if name not in fields]:
        lacks, line = " and ".join(f"`{name}`" for name in missing), f"`{missing[0]}: ...`"
        passed = " ".join(f"{name}=..." for name in missing)
        raise RecipeError(f"the recipe lacks {lacks}: add a line {line} to it, or pass {passed}")
    recipe = Recipe(**fields)
    check_recipe(recipe)
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML that `load_recipe` reads back."""
    return yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False, allow_unicode=True)


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        if key not in SECTIONS:
            flat[key] = value
        elif isinstance(value, Mapping):
            flat |= {f"{key}.{name}": item for name, item in value.items()}
        elif value is not None:
            raise RecipeError(f"`{key}` is {kind_of(value)}: it is a mapping, or dotted keys like `{key}.name`")
    return flat
