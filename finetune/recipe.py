"""Recipes: a flat YAML file, `key=value` overrides from the command line, one frozen dataclass.

Keys of two libraries pass through by their own names: `lora.*` to `peft.LoraConfig` (plus `lora.targets`, the words of
`lora.py`) and `training.*` to `transformers.TrainingArguments`. They may be written dotted or as a nested mapping.
Nothing is dropped in silence: an unknown key is an error that names the nearest known one.
"""

import dataclasses
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .lora import check_words, nearest

SHIPPED = {name: Path(__file__).parent / "recipes" / f"{name}.yaml" for name in ("lora_all", "lora_attention", "full")}
_SECTIONS = ("lora", "losses", "training")
_DTYPES = ("auto", "float32", "bfloat16", "float16")
# The fields of `DeepseekMoeConfig` that only training reads.
_LOSSES = (
    "aux_loss_alpha",
    "aux_loss_type",
    "seq_aux",
    "device_loss_alpha",
    "communication_loss_alpha",
    "balance_devices",
    "aux_loss_counts_padding",
    "mtp_loss_weight",
)
_OWN_INSTEAD = {
    "output_dir": "set `output_dir`",
    "seed": "set `seed`",
    "gradient_checkpointing": "set `gradient_checkpointing`",
    "activation_checkpointing": "set `gradient_checkpointing`",
    "push_to_hub": "set `hub_id`",
    "hub_model_id": "set `hub_id`",
    "hub_private_repo": "set `hub_private`",
    "hub_token": "tokens do not belong in a recipe: run `hf auth login`",
    "label_smoothing_factor": "the Trainer would replace the model's losses by one of its own, on unshifted labels",
    "resume_from_checkpoint": "the same recipe run again resumes by itself",
}


class RecipeError(ValueError):
    """Something in a recipe or in the data it names is wrong; the message is one line that says the way out."""


@dataclass(frozen=True)
class Recipe:
    """One fine-tuning run.

    Attributes:
        model: local folder or Hub name of the model to start from.
        data: training rows: a local JSONL file, or the Hub name of a data set (`data.py` says which rows).
        output_dir: folder for checkpoints and results; the same recipe run again resumes in it.
        eval_data: rows to measure the loss on; without it, `eval_fraction` of the training rows is held out.
        eval_fraction: share of `data` to hold out, 0 for none.
        data_split, eval_split: which split of a Hub data set.
        max_length: longer rows are cut to this many tokens.
        dtype: of the weights in memory: auto (as stored), float32, bfloat16 or float16.
        attn_implementation, experts_implementation: kernels by their transformers names; None for the model's default.
        gradient_checkpointing: compute activations twice to keep fewer.
        bias_update_speed: step of the router's balancing bias after every optimizer step; 0 freezes it.
        seed: of everything random.
        merge: also save the model with the adapters merged into its weights.
        overwrite: empty an `output_dir` that holds another run.
        hub_id, hub_private: push the result to this Hub repository.
        losses: fields of the model's config that weigh its balance and multi-token losses, where they should differ
            from the model's own: `aux_loss_alpha`, `mtp_loss_weight` and others (`DeepseekMoeConfig` explains them).
        lora: `targets` (words) and options of `peft.LoraConfig`; empty for full fine-tuning.
        training: options of `transformers.TrainingArguments`.
    """

    model: str
    data: str
    output_dir: str
    eval_data: str | None = None
    eval_fraction: float = 0.05
    data_split: str = "train"
    eval_split: str = "test"
    max_length: int = 2048
    dtype: str = "auto"
    attn_implementation: str | None = None
    experts_implementation: str | None = None
    gradient_checkpointing: bool = False
    bias_update_speed: float = 0.0
    seed: int = 42
    merge: bool = False
    overwrite: bool = False
    hub_id: str | None = None
    hub_private: bool = True
    losses: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        path: a YAML file, or the name of a shipped recipe (`lora_all`).
        overrides: `key=value` strings that win over the file; values are YAML.

    Raises:
        RecipeError: the file is missing or not a YAML mapping, or a key or a value is wrong.
    """
    path = Path(path)
    if not path.is_file():
        path = SHIPPED.get(str(path).removesuffix(".yaml"), path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise RecipeError(f"cannot read recipe {path}: {reason} (shipped recipes: {', '.join(SHIPPED)})") from error
    values = _yaml(text, str(path))
    if not isinstance(values, dict):
        raise RecipeError(f"{path} is not a recipe: it holds {_kind(values)}, not `key: value` lines")
    raw = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise RecipeError(f"{override!r} is not of the form key=value")
        raw[key] = value
    return make_recipe({**_flat(values), **_flat({key: _yaml(value, key) for key, value in raw.items()})}, raw)


def make_recipe(values: Mapping[str, Any], raw: Mapping[str, str] | None = None) -> Recipe:
    """Check values and build a recipe from them.

    Args:
        values: recipe keys (those of a section dotted or nested) and their values.
        raw: for keys that came from the command line, their text, which a string key takes as it stands.

    Raises:
        RecipeError: as `load_recipe`.
    """
    own = typing.get_type_hints(Recipe)
    sections = {"lora": _lora_hints(), "losses": _losses_hints(), "training": _training_hints()}
    known = {key: hint for key, hint in own.items() if key not in _SECTIONS}
    known |= {f"{section}.{key}": hint for section, hints in sections.items() for key, hint in hints.items()}
    fields: dict[str, Any] = {section: {} for section in _SECTIONS}
    for key, value in _flat(values).items():
        section, _, name = str(key).partition(".")
        if section == "training" and name in _OWN_INSTEAD:
            raise RecipeError(f"`{key}` is not a recipe key: {_OWN_INSTEAD[name]}")
        if key not in known:
            raise RecipeError(f"unknown recipe key `{key}`: did you mean `{nearest(str(key), known)}`?")
        target = fields[section] if section in _SECTIONS else fields
        target[name if section in _SECTIONS else key] = _convert(key, value, known[key], (raw or {}).get(key))
    required = [item.name for item in dataclasses.fields(Recipe) if item.default is item.default_factory]
    if missing := [name for name in required if name not in fields]:
        raise RecipeError(f"the recipe lacks `{missing[0]}`: add a line `{missing[0]}: ...` or pass {missing[0]}=...")
    recipe = Recipe(**fields)
    _check(recipe)
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML that `load_recipe` reads back."""
    return yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False, allow_unicode=True)


def _check(recipe: Recipe) -> None:
    if recipe.dtype not in _DTYPES:
        raise RecipeError(f"`dtype` is {recipe.dtype!r}: choose one of {', '.join(_DTYPES)}")
    if recipe.max_length < 2:
        raise RecipeError(f"`max_length` is {recipe.max_length}: a row needs at least 2 tokens to learn from")
    if not 0 <= recipe.eval_fraction < 1:
        raise RecipeError(f"`eval_fraction` is {recipe.eval_fraction}: it is a share of the rows, from 0 to below 1")
    if recipe.bias_update_speed < 0:
        raise RecipeError(f"`bias_update_speed` is {recipe.bias_update_speed}: it cannot be negative")
    if recipe.lora and not recipe.lora.get("targets"):
        key = next(iter(recipe.lora))
        raise RecipeError(
            f"`lora.{key}` has no effect without `lora.targets`: list its words, or remove the lora keys"
        )
    try:
        check_words(recipe.lora.get("targets", []))
    except ValueError as error:
        raise RecipeError(f"`lora.targets`: {error}") from error
    if recipe.merge and not recipe.lora:
        raise RecipeError("`merge` is true but there are no adapters to merge: set `lora.targets`, or merge: false")
    if recipe.bias_update_speed and recipe.lora and not recipe.merge:
        raise RecipeError(
            "`bias_update_speed` moves the routers' bias, which an adapter does not carry: set it to 0 to freeze the "
            "bias, or set merge: true to save the model that has it"
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


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}, line {mark.line + 1}" if mark else where
        raise RecipeError(f"{place}: not YAML: {getattr(error, 'problem', None) or error}") from error


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        if key not in _SECTIONS:
            flat[key] = value
        elif isinstance(value, Mapping):
            flat |= {f"{key}.{name}": item for name, item in value.items()}
        elif value is not None:
            raise RecipeError(f"`{key}` is {_kind(value)}: it is a mapping, or dotted keys like `{key}.name`")
    return flat


def _lora_hints() -> dict[str, Any]:
    from peft import LoraConfig

    ours = {"target_modules", "target_parameters", "task_type", "peft_type"}
    hints = typing.get_type_hints(LoraConfig)
    return {"targets": list[str]} | {
        item.name: hints[item.name] for item in dataclasses.fields(LoraConfig) if item.init and item.name not in ours
    }


def _losses_hints() -> dict[str, Any]:
    from modeling_deepseek_moe import DeepseekMoeConfig

    hints = {name: DeepseekMoeConfig.__annotations__[name] for name in _LOSSES}
    return {name: float if hint == float | int else hint for name, hint in hints.items()}


def _training_hints() -> dict[str, Any]:
    from transformers import TrainingArguments

    hints = typing.get_type_hints(TrainingArguments)
    return {
        item.name: hints[item.name]
        for item in dataclasses.fields(TrainingArguments)
        if item.init and not item.name.startswith(("hub_", "do_")) and item.name not in _OWN_INSTEAD
    }


def _kind(value: Any) -> str:
    names = {bool: "a truth value", int: "a number", float: "a number", str: "text", list: "a list", dict: "a mapping"}
    return "nothing" if value is None else names.get(type(value), f"a {type(value).__name__}")


def _convert(key: str, value: Any, hint: Any, raw: str | None) -> Any:
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
        f"`{key}` is {value!r}, {_kind(value)}; it must be {' or '.join(wanted) or 'set from Python'}{hint}"
    )
