"""The card of a published model: metadata, and a text about what was trained, on what, how, with what result.

Everything in it is read from the run's folder. What is not known is said to be unknown, or left out of the metadata.
"""

import dataclasses
import inspect
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import TrainingArguments

from modeling_deepseek_moe.conversion.adapters.files import ADAPTER_CONFIG
from modeling_deepseek_moe.finetune.errors import UserError
from modeling_deepseek_moe.finetune.model.lora import lora_config
from modeling_deepseek_moe.finetune.recipe.schema import Recipe
from modeling_deepseek_moe.finetune.runs.results import RunResults

from .metadata import is_repository, problems
from .ways_to_load import ways_to_load

TEMPLATE = Path(__file__).with_name("card.md.jinja")
PICTURES = ("loss.png", "experts.png")
_LICENCE_FIELDS = ("license", "license_name", "license_link")
# Of a run and the machine, not of the model.
_LEFT_OUT = ("output_dir", "overwrite", "hub_id", "hub_private", "merge")
_PATHS = ("model", "data", "eval_data", "metric")


def run_card(
    results: RunResults,
    kind: str,
    folder: Path,
    repo_id: str,
    base: str | None = None,
    licence: dict[str, str] | None = None,
    base_json: dict[str, Any] | None = None,
) -> ModelCard:
    """The card of what is in `folder`.

    Args:
        results: the run's.
        kind: adapter, model, code or one of DeepSeek's model types.
        folder: the files that are pushed.
        repo_id: the repository that it is pushed to.
        base: the base's name on the Hub, if it has one.
        base_json: its `config.json`, if that is at hand.
        licence: `license`, and where that is "other" `license_name` and `license_link`; empty if nobody said.

    Raises:
        UserError: the metadata would not be accepted by the Hub.
    """
    name = repo_id.rpartition("/")[2]
    data = ModelCardData(
        base_model=base,
        library_name="peft" if (folder / ADAPTER_CONFIG).is_file() else "transformers",
        pipeline_tag="text-generation",
        datasets=_data_sets(results.recipe) or None,
        tags=_tags(results, kind),
        model_name=name,
        eval_results=_eval_results(results, name) or None,
        **({"base_model_relation": "adapter" if kind == "adapter" else "finetune"} if base else {}),
        **(licence or {}),
    )
    check(data)
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        kind=kind,
        base=base,
        base_folder=None if base or not results.base else Path(results.base).name,
        licence=(licence or {}).get("license_name") or (licence or {}).get("license"),
        summary=results.summary,
        recipe=results.recipe,
        settings=_settings(results),
        recipe_yaml=recipe_yaml(results.recipe),
        measures=measures(results.summary),
        data_rows=_data_rows(results),
        pictures=[picture for picture in PICTURES if (folder / picture).is_file()],
        ways=ways_to_load(folder, kind, repo_id, base, base_json),
    )


def check(data: ModelCardData) -> None:
    """Raise a UserError for metadata that the Hub would refuse."""
    if found := problems(yaml.safe_load(data.to_yaml())):
        raise UserError(f"the Hub would not accept the model card: {'; '.join(found)}")


def licence_of(card: str) -> dict[str, str]:
    """What the text of a base's card says about its licence; empty if it says nothing."""
    try:
        data = ModelCard(card, ignore_metadata_errors=True).data
    except (ValueError, yaml.YAMLError, RecursionError):
        return {}
    return {name: value for name in _LICENCE_FIELDS if isinstance(value := data.get(name), str)}


def measures(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Rows of the table of results: what was measured, before and after."""
    rows = []
    before, after = summary.get("eval_loss_before"), summary.get("eval_loss_after")
    if after is not None:
        rows.append(("loss on held-out rows (nats a learned token)", number(before), number(after)))
        rows.append(("perplexity of that", *(number(_exp(loss)) for loss in (before, after))))
    metrics = [_metrics(summary.get(f"metric_{when}")) for when in ("before", "after")]
    rows += [(name, number(metrics[0].get(name)), number(metrics[1].get(name))) for name in metrics[1]]
    return rows


def number(value: Any) -> str:
    """A number as people read it."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return "not measured" if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:#.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def recipe_yaml(recipe: dict[str, Any]) -> str:
    """The recipe as one can run it again: what was set, and of paths on this machine only the names."""
    usual = {item.name: item.default for item in dataclasses.fields(Recipe)}
    kept = {}
    for key, value in recipe.items():
        if key not in _LEFT_OUT and value not in (usual.get(key), None, {}):
            kept[key] = shown(value) if key in _PATHS else _without_paths(value)
    return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True) if kept else ""


def _without_paths(value: Any) -> Any:
    """A recipe's value with the names of files and folders instead of where they lie on this machine."""
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    is_path = isinstance(value, str) and (value.startswith(("/", "~")) or (os.sep in value and Path(value).exists()))
    return Path(value).name if is_path else value


def shown(source: str) -> str:
    """A path's last part; a name on the Hub as it is."""
    return source if on_the_hub(source) else Path(source).name


def on_the_hub(source: Any) -> bool:
    """Whether a model or data set that a recipe names is one of the Hub's, and nothing on this machine."""
    return is_repository(source) and Path(source).suffix not in (".jsonl", ".json") and not Path(source).exists()


def _data_sets(recipe: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(source for key in ("data", "eval_data") if on_the_hub(source := recipe.get(key))))


def _tags(results: RunResults, kind: str) -> list[str]:
    trained = ["lora"] if results.summary.get("lora") else ["esft"] if results.recipe.get("esft") else []
    trained += ["dpo"] if results.recipe.get("dpo") else []
    form = ["custom_code"] if kind == "code" else []
    return ["deepseek_moe", "mixture-of-experts", *trained, *form]


def _eval_results(results: RunResults, name: str) -> list[EvalResult]:
    summary, source = results.summary, results.recipe.get("eval_data") or results.recipe.get("data")
    if not source:
        return []
    split = results.recipe.get("eval_split" if results.recipe.get("eval_data") else "data_split")
    where = {
        "task_type": "text-generation",
        "dataset_type": source if on_the_hub(source) else Path(source).stem,
        "dataset_name": f"{shown(source)}, held-out rows",
        "dataset_split": split if on_the_hub(source) else None,
    }
    loss, found = summary.get("eval_loss_after"), []
    if _is_number(loss):
        found.append(EvalResult(metric_type="loss", metric_name="Loss", metric_value=round(loss, 6), **where))
        if (perplexity := _exp(loss)) is not None:
            perplexity = round(perplexity, 4)
            found.append(
                EvalResult(metric_type="perplexity", metric_name="Perplexity", metric_value=perplexity, **where)
            )
    for metric, value in _metrics(summary.get("metric_after")).items():
        if _is_number(value):
            found.append(EvalResult(metric_type=metric, metric_name=metric, metric_value=round(value, 6), **where))
    return found


def _metrics(value: Any) -> dict[str, Any]:
    """A metric's numbers by name; one without a name is called score."""
    return value if isinstance(value, dict) else {} if value is None else {"score": value}


def _settings(results: RunResults) -> list[tuple[str, str]]:
    """The hyper-parameters that a reader looks for, where the recipe says them or leaves them to the library."""
    recipe, summary = results.recipe, results.summary
    rows: list[tuple[str, Any]] = []
    if lora := recipe.get("lora"):
        rank, alpha = (lora.get(name, _default(lora_config, name)) for name in ("r", "lora_alpha"))
        rows.append(("LoRA", f"on {', '.join(lora['targets'])}; r {rank}, alpha {alpha}"))
    if summary.get("trainable_parameters"):
        trained, parameters = summary["trainable_parameters"], summary["parameters"]
        rows.append(("trained parameters", f"{trained:,} of {parameters:,} ({trained / parameters:.2%})"))
    if summary.get("steps"):
        rows.append(("optimizer steps", f"{summary['steps']:,} ({summary['epochs']:.3g} epochs)"))
    if recipe:
        rows += _of_the_trainer(recipe)
        speed = recipe.get("bias_update_speed")
        rows.append(("frozen weights in training", recipe.get("quantization")))
        rows.append(("routers' selection bias", f"moved by {speed} a step" if speed else "as in the base"))
        rows += list((recipe.get("losses") or {}).items())
        rows.append(("seed", recipe.get("seed")))
    return [(name, str(value)) for name, value in rows if value is not None]


def _of_the_trainer(recipe: dict[str, Any]) -> list[tuple[str, Any]]:
    given = recipe.get("training") or {}
    # Preferences are learned with another class of arguments, whose defaults differ.
    values = (
        given if recipe.get("dpo") else {item.name: item.default for item in dataclasses.fields(TrainingArguments)}
    )
    values = values | given
    rows, times = values.get("per_device_train_batch_size"), values.get("gradient_accumulation_steps", 1)
    batch = rows and f"{rows} on each device" + (f", {times} times" if times > 1 else "")
    rate = values.get("learning_rate")
    optimizer = values.get("optim")
    return [
        ("rows a step", batch),
        ("learning rate", rate and f"{rate:g}"),
        ("schedule", getattr(schedule := values.get("lr_scheduler_type"), "value", schedule)),
        ("optimizer", getattr(optimizer, "value", optimizer)),
    ]


def _default(function: Callable, name: str) -> Any:
    return inspect.signature(function).parameters[name].default


def _data_rows(results: RunResults) -> list[tuple[str, str]]:
    recipe, summary = results.recipe, results.summary
    if not recipe.get("data"):
        return []
    rows = [("rows to learn from", f"{_count(summary.get('train_rows'))} of {_linked(recipe['data'])}")]
    if summary.get("eval_rows"):
        source = _linked(recipe["eval_data"]) if recipe.get("eval_data") else "the same, held out before training"
        rows.append(("rows to measure on", f"{summary['eval_rows']:,} of {source}"))
    longer = {
        "cut": "longer rows were cut",
        "split": "longer texts were split",
        "skip": "longer rows were left out",
        "stop": "no row was longer",
    }
    rest = longer[recipe.get("long_rows") or "cut"]
    rows.append(("tokens a row", f"at most {recipe.get('max_length', 0):,}; {rest}"))
    return rows


def _count(rows: int | None) -> str:
    return "as many as were streamed" if rows is None else f"{rows:,}"


def _linked(source: str) -> str:
    return f"[{source}](https://huggingface.co/datasets/{source})" if on_the_hub(source) else f"`{Path(source).name}`"


def _exp(loss: Any) -> float | None:
    return math.exp(loss) if _is_number(loss) and loss < 50 else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
