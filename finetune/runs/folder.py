"""The folder of a run: whose it is, what is in it, and which of its checkpoints are whole.

recipe.yaml          the recipe that the folder belongs to
data/                tokenized rows
data_report.json     how many rows were used, cut and left out, and why
checkpoint-<step>/   of the Trainer; `complete` in it is written last
before.json          measured before the first step; metric_before.json, what the metric said then
adapter/  model/     results: the adapters, and the whole (or merged) model, each with the tokenizer
expert_cfg.json  expert_scores.json      the experts that ESFT trains, and by which scores they were chosen
bad_batch.json       the rows at which a loss became no number
loss.png  experts.png  experts.json  summary.json  trainer_state.json
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import RecipeError
from ..files import file_digest, remove, write_text
from ..recipe.load import dump_recipe, load_recipe
from ..recipe.schema import Recipe

_RECIPE, _DATA_MARKS, _COMPLETE = "recipe.yaml", "data.json", "complete"
_OURS = re.compile(
    r"recipe\.yaml|data|checkpoint-\d+|adapter|model|loss\.png|experts\.(?:png|json)|.+\.aside|"
    r"(?:data|data_report|before|metric_before|expert_cfg|expert_scores|bad_batch|summary|trainer_state)\.json"
)
MAY_CHANGE = {"output_dir", "overwrite", "hub_id", "hub_private", "merge", "metric", "metric_rows"}


def open_run(recipe: Recipe) -> tuple[Path, bool]:
    """The run's folder, and whether the run is new; half-written checkpoints and results in it are removed.

    Raises:
        RecipeError: the folder holds something else, and `overwrite` does not allow to empty it of another run, or it
            cannot be written.
    """
    folder = Path(recipe.output_dir).expanduser()
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"`output_dir` {folder} is a file: give a folder")
    marks = {key: _digest(source) for key in ("data", "eval_data") if (source := getattr(recipe, key))}
    is_new = not (folder / _RECIPE).is_file()
    if not is_new:
        if differs := _difference(folder, recipe, marks):
            if not recipe.overwrite:
                raise RecipeError(
                    f"`output_dir` {folder} holds another run ({differs}): choose another folder, or set "
                    "`overwrite: true` to delete that run"
                )
            remove(path for path in folder.iterdir() if _OURS.fullmatch(path.name))
    elif folder.exists() and any(folder.iterdir()):
        raise RecipeError(f"`output_dir` {folder} holds files that are not of a run: choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / _DATA_MARKS, json.dumps(marks))
        write_text(folder / _RECIPE, dump_recipe(recipe))
    except OSError as error:
        raise RecipeError(f"cannot write in `output_dir` {folder}: {error.strerror}") from error
    remove(folder.glob("*.aside"))
    remove(path for path in _checkpoints(folder) if not (path / _COMPLETE).is_file())
    return folder, is_new


def forget_run(folder: Path) -> None:
    """Takes a run that could not begin back out of its folder, and the folder away if nothing else is in it."""
    remove(path for path in folder.iterdir() if _OURS.fullmatch(path.name))
    if not any(folder.iterdir()):
        folder.rmdir()


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end."""
    whole = [path for path in _checkpoints(folder) if (path / _COMPLETE).is_file()]
    return max(whole, key=_step, default=None)


def mark_complete(checkpoint: Path) -> None:
    """Says that everything in this checkpoint is on disk."""
    write_text(checkpoint / _COMPLETE, "")


class MarkCheckpoints(TrainerCallback):
    """Marks a checkpoint when all of it is written, so that a later run can tell it from one cut off by a kill."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            mark_complete(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def _difference(folder: Path, recipe: Recipe, marks: dict[str, str]) -> str:
    """What tells this recipe from the folder's, in a few words; empty if nothing does."""
    try:
        theirs = load_recipe(folder / _RECIPE)
    except RecipeError as error:
        return f"its recipe cannot be read: {error}"
    for item in dataclasses.fields(Recipe):
        here, there = getattr(recipe, item.name), getattr(theirs, item.name)
        if item.name not in MAY_CHANGE and here != there:
            return f"its `{item.name}` is {there!r}, not {here!r}"
    known: dict[str, Any] = json.loads((folder / _DATA_MARKS).read_text(encoding="utf-8"))
    return next((f"the rows of `{key}` have changed since" for key in marks if marks[key] != known.get(key)), "")


def _digest(source: str) -> str:
    """SHA-256 of a local file's bytes, empty for a Hub name."""
    return file_digest(Path(source)) if Path(source).is_file() else ""


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
