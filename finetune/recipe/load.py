"""Recipes: a flat YAML file, `key=value` overrides from the command line, one frozen dataclass.

Keys of two libraries pass through by their own names: `lora.*` to `peft.LoraConfig` (plus `lora.targets`, the words of
`lora.py`) and `training.*` to `transformers.TrainingArguments`. They may be written dotted or as a nested mapping.
Nothing is dropped in silence: an unknown key is an error that names the nearest known one.
"""

import dataclasses
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from ..evaluate.metrics import check_metric
from ..model.lora import check_words, nearest
from ..model.quantization import check_quantization
from .checks import check_data_keys, check_lora
from .sections import OWN_INSTEAD, SECTIONS, check_esft, section_hints
from .values import RecipeError, convert_value, kind_of, read_yaml

_OF_THE_DEMO = ("demo", "pretrain_demo")
SHIPPED = {
    path.stem: path
    for path in sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
    if path.stem not in _OF_THE_DEMO
}
_DTYPES = ("auto", "float32", "bfloat16", "float16")


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
        max_length: longer rows are cut to this many tokens, or what `long_rows` says.
        long_rows: what to do with rows longer than that: cut, split (`text` goes on in further rows), skip or stop.
        bad_rows: what to do with a row that cannot be read: stop or skip; skipped ones are counted and shown.
        packing: put several training rows into one sequence of `max_length` tokens, none of which sees another.
        streaming: read the rows while training instead of before; needs `eval_data` and `training.max_steps`.
        dtype: of the weights in memory: auto (as stored), float32, bfloat16 or float16.
        quantization: keep the frozen weights in four bits: nf4; None for not.
        attn_implementation, experts_implementation: kernels by their transformers names; None for the model's default.
        gradient_checkpointing: compute activations twice to keep fewer.
        bias_update_speed: step of the router's balancing bias after every optimizer step; 0 freezes it.
        metric: judges answers to held-out rows, before and after: exact_match, json_match, the path of a script for
            `evaluate`, or a Hub name; None for not.
        metric_rows: on at most so many of them.
        seed: of everything random.
        merge: also save the model with the adapters merged into its weights.
        overwrite: empty an `output_dir` that holds another run.
        hub_id, hub_private: push the result to this Hub repository.
        losses: fields of the model's config that weigh its balance and multi-token losses, where they should differ
            from the model's own: `aux_loss_alpha`, `mtp_loss_weight` and others (`DeepseekMoeConfig` explains them).
        lora: `targets` (words) and options of `peft.LoraConfig`; empty for full fine-tuning.
        esft: train only the experts that serve the data most (`EsftOptions` in `recipe_sections.py`); empty for not.
        dpo: learn from preferences (`prompt`, `chosen`, `rejected`): options of `trl.DPOConfig`; empty for not.
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
    long_rows: Literal["cut", "split", "skip", "stop"] = "cut"
    bad_rows: Literal["stop", "skip"] = "stop"
    packing: bool = False
    streaming: bool = False
    dtype: str = "auto"
    quantization: Literal["nf4"] | None = None
    attn_implementation: str | None = None
    experts_implementation: str | None = None
    gradient_checkpointing: bool = False
    bias_update_speed: float = 0.0
    metric: str | None = None
    metric_rows: int = 200
    seed: int = 42
    merge: bool = False
    overwrite: bool = False
    hub_id: str | None = None
    hub_private: bool = True
    losses: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    esft: dict[str, Any] = field(default_factory=dict)
    dpo: dict[str, Any] = field(default_factory=dict)
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
    values = read_yaml(text, str(path))
    if not isinstance(values, dict):
        raise RecipeError(f"{path} is not a recipe: it holds {kind_of(values)}, not `key: value` lines")
    raw = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise RecipeError(f"{override!r} is not of the form key=value")
        raw[key] = value
    return make_recipe({**_flat(values), **_flat({key: read_yaml(value, key) for key, value in raw.items()})}, raw)


def make_recipe(values: Mapping[str, Any], raw: Mapping[str, str] | None = None) -> Recipe:
    """Check values and build a recipe from them.

    Args:
        values: recipe keys (those of a section dotted or nested) and their values.
        raw: for keys that came from the command line, their text, which a string key takes as it stands.

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
            raise RecipeError(f"unknown recipe key `{key}`: did you mean `{nearest(str(key), known)}`?")
        target = fields[section] if section in SECTIONS else fields
        target[name if section in SECTIONS else key] = convert_value(key, value, known[key], (raw or {}).get(key))
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
    check_lora(recipe)
    check_quantization(recipe)
    if recipe.merge and not (recipe.lora or recipe.esft):
        raise RecipeError(
            "`merge` is true but there are no adapters to merge: set `lora.targets` or an `esft` key, or merge: false"
        )
    saves_no_bias = recipe.lora or (recipe.esft and not recipe.esft.get("non_expert_modules"))
    if recipe.bias_update_speed and saves_no_bias and not recipe.merge:
        raise RecipeError(
            "`bias_update_speed` moves the routers' bias, which an adapter does not carry: set it to 0 to freeze the "
            "bias, or set merge: true to save the model that has it"
        )
    check_esft(recipe)
    check_data_keys(recipe)
    check_metric(recipe)


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
