"""What there is to publish: the results of a run, or a folder of an adapter or a model from elsewhere."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modeling_deepseek_moe.conversion.adapters.esft import ESFT_CONFIG
from modeling_deepseek_moe.conversion.adapters.files import ADAPTER_CONFIG

from ..errors import UserError
from ..files import file_digest, read_object
from ..recipe.load import RUN_RECIPE
from ..recipe.values import read_yaml_file
from .folder import DATA_MARKS, MAY_CHANGE, read_kept

_PARTS = ("adapter", "model")
_OF_A_MACHINE = ("model", "data", "eval_data")


@dataclass(frozen=True)
class RunResults:
    """Trained weights, and what is known of how they came about.

    Attributes:
        folder: the run's, or that of the weights themselves.
        adapter, model: folders with the weights; at least one is there.
        recipe: the run's, its keys as in `recipe.yaml`; empty where there was no run.
        summary: the run's `summary.json`; empty where there was no run.
        base: the model that was tuned, a folder or a name on the Hub, if anything says so.
    """

    folder: Path
    adapter: Path | None
    model: Path | None
    recipe: dict[str, Any]
    summary: dict[str, Any]
    base: str | None

    def identity(self) -> str:
        """A digest of recipe and rows, wherever they lie; of the weights where there is no recipe."""
        if self.recipe:
            return run_identity(self.folder)
        weights = sorted((self.model or self.adapter).glob("*.safetensors"))
        return _digest([[path.name, file_digest(path)] for path in weights])


def run_identity(folder: Path) -> str:
    """`RunResults.identity` of a run that has begun."""
    recipe = read_yaml_file(folder / RUN_RECIPE)
    kept = {key: value for key, value in recipe.items() if key not in MAY_CHANGE}
    kept |= {key: str(value).rpartition("/")[2] for key in _OF_A_MACHINE if (value := kept.get(key))}
    marks = {key: value for key, value in read_kept(folder / DATA_MARKS).items() if key not in MAY_CHANGE}
    return _digest([kept, marks])


def read_results(folder: Path) -> RunResults:
    """The results in a folder of `deepseek-moe finetune`, in its `adapter` or `model`, or in any folder with weights.

    Raises:
        UserError: there are none, or the run has not come to its end.
    """
    folder = Path(folder).expanduser().resolve()
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {what}: give the folder of a run, of an adapter or of a model")
    if folder.name in _PARTS and (folder.parent / RUN_RECIPE).is_file():
        run = read_results(folder.parent)
        parts = {part: getattr(run, part) if folder.name == part else None for part in _PARTS}
        return RunResults(run.folder, parts["adapter"], parts["model"], run.recipe, run.summary, run.base)
    if (folder / RUN_RECIPE).is_file():
        return _of_a_run(folder)
    if is_adapter(folder):
        name = (read_object(folder / ADAPTER_CONFIG) or {}).get("base_model_name_or_path")
        return RunResults(folder, folder, None, {}, {}, name or None)
    if (folder / "config.json").is_file():
        return RunResults(folder, None, folder, {}, {}, None)
    raise UserError(
        f"{folder} has no results to push: neither recipe.yaml of a run, nor {ADAPTER_CONFIG} or {ESFT_CONFIG} of an "
        "adapter, nor config.json of a model"
    )


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's, or the `adapter` or `model` in one."""
    folder = folder.expanduser()
    inside = folder.name in _PARTS and (folder.parent / RUN_RECIPE).is_file() and folder.is_dir()
    return inside or (folder / RUN_RECIPE).is_file()


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a LoRA or an ESFT adapter."""
    return any((folder / name).is_file() for name in (ADAPTER_CONFIG, ESFT_CONFIG))


def _of_a_run(folder: Path) -> RunResults:
    parts = {part: folder / part if (folder / part).is_dir() else None for part in _PARTS}
    if not (folder / "summary.json").is_file() or not any(parts.values()):
        raise UserError(
            f"{folder} has no results yet: its run has not come to its end; the same `deepseek-moe finetune` goes on"
        )
    recipe, summary = read_yaml_file(folder / RUN_RECIPE), (read_object(folder / "summary.json") or {})
    if not isinstance(recipe, dict) or not summary:
        raise UserError(f"{folder}: recipe.yaml or summary.json is not of a run")
    return RunResults(folder, parts["adapter"], parts["model"], recipe, summary, recipe.get("model"))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
