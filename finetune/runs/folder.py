"""The folder of a run: whose it is, who works in it, and what a run that goes on finds there.

recipe.yaml          the recipe that the folder belongs to
data.json            which rows it is about; data/, those rows tokenized, with `complete` written last
data_report.json     how many rows were used, cut and left out, and why
checkpoint-<step>/   of the Trainer; `complete` in it is written last
before.json          measured before the first step; metric_before.json, what the metric said then
adapter/  model/     results: the adapters, and the whole (or merged) model, each with the tokenizer
expert_cfg.json  expert_scores.json      the experts that ESFT trains, and by which scores they were chosen
bad_batch.json       the rows at which a loss became no number; bad_batch-1.json, those of process 1
loss.png  experts.png  experts.json  summary.json  trainer_state.json
run.lock             while a process works here
replaced-run/        what was here before, until the run that takes its place has made its first step
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import RecipeError, UserError
from ..files import path_digest, read_object, remove, write_text
from ..recipe.load import RUN_RECIPE, dump_recipe, load_recipe
from ..recipe.schema import Recipe
from .checkpoints import sound_checkpoint, unfinished_checkpoints
from .lock import Locked, locked
from .together import wait_for_failing_processes

ROWS, SUMMARY, RESULTS = "data", "summary.json", ("adapter", "model")
DATA_MARKS, _LOCK = "data.json", "run.lock"
# The second name while files move there or back: then those that have not moved are of the old run, too.
_REPLACED, _MOVING = "replaced-run", "replaced-run.moving"
_OURS = re.compile(
    r"recipe\.yaml|data|checkpoint-\d+|adapter|model|loss\.png|experts\.(?:png|json)|.+\.aside|"
    r"(?:data|data_report|before|metric_before|expert_cfg|expert_scores|bad_batch(?:-\d+)?|summary|trainer_state)\.json"
)
MAY_CHANGE = {"output_dir", "overwrite", "hub_id", "hub_private", "merge", "metric", "metric_rows", "parallel"}
_NOT_IN_RESULTS = {"output_dir", "overwrite", "hub_id", "hub_private", "parallel"}
# With `global_batch_size`: how its rows are dealt out changes nothing but the order of sums.
_OF_DEALING = ("per_device_train_batch_size", "per_device_eval_batch_size")
_ROWS = ("data", "eval_data")


@dataclass
class OpenRun:
    """What a run finds in its folder.

    Attributes:
        folder: where it is.
        is_new: nothing of it was there, and nothing will be if it cannot begin.
        checkpoint: the one to go on from.
        summary: what it came to, if it has been at its end before.
        is_finished: and nothing is left to do.
    """

    folder: Path
    is_new: bool
    checkpoint: Path | None = None
    summary: dict[str, Any] | None = None
    is_finished: bool = False

    def keep(self) -> None:
        """From now on, a run that is stopped goes on in the folder."""
        self.is_new = False


@contextlib.contextmanager
def open_run(recipe: Recipe) -> Iterator[OpenRun]:
    """Holds a run's folder; with several processes the main one does, and all get what it found, or its error.

    Half-written checkpoints and results are removed. A run that another one replaces comes back unless that has made
    its first step (`SettleRun`); a new one that ends before `keep` leaves nothing.

    Raises:
        UserError: another process works in the folder; it holds something else, and `overwrite` does not allow to
            replace it; no checkpoint in it is as it was written; or it cannot be written.
    """
    group = torch.distributed.is_available() and torch.distributed.is_initialized()
    with contextlib.ExitStack() as stack:
        found: list[OpenRun | UserError | None] = [None]
        if not group or torch.distributed.get_rank() == 0:
            try:
                found = [stack.enter_context(_opened(recipe))]
            except UserError as error:
                found = [error]
        if group:
            torch.distributed.broadcast_object_list(found)
        if isinstance(found[0], UserError):
            raise found[0]
        try:
            yield found[0]
        except BaseException:
            # The others may still write into what the main process is going to remove.
            if group and (torch.distributed.get_rank() or found[0].is_new or is_replacing(found[0].folder)):
                wait_for_failing_processes()
            raise


class SettleRun(TrainerCallback):
    """After the first step, a run that replaces another one has begun, and that one goes."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        folder = Path(args.output_dir)
        if state.is_world_process_zero and is_replacing(folder):
            gone = folder / f"{_REPLACED}.aside"
            os.rename(folder / _REPLACED, gone)
            remove([gone])


def is_replacing(folder: Path) -> bool:
    """Whether the run that was in the folder before would come back."""
    return (folder / _REPLACED).is_dir()


def write_kept(path: Path, value: Any) -> None:
    """Write a JSON value that `read_kept` will know to be unchanged."""
    write_text(path, json.dumps({"value": value, "sha256": _digest_of(value)}) + "\n")


def read_kept(path: Path) -> Any:
    """The value in a file of `write_kept`.

    Raises:
        UserError: the file is missing, or is not as it was written.
    """
    try:
        kept = json.loads(path.read_bytes())
        if kept["sha256"] == _digest_of(kept["value"]):
            return kept["value"]
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    raise UserError(f"{path} is damaged: it is not as it was written")


def _digest_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _opened(recipe: Recipe) -> Iterator[OpenRun]:
    folder = Path(recipe.output_dir).expanduser()
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"`output_dir` {folder} is a file: give a folder")
    found = None
    try:
        with _held(folder):
            try:
                found = _claim(folder, recipe)
                yield found
            except BaseException:
                if not _bring_back(folder) and found and found.is_new:
                    _remove_run(folder)
                raise
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()  # if nothing is in it


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        try:
            while True:
                folder.mkdir(parents=True, exist_ok=True)
                try:
                    stack.enter_context(locked(folder / _LOCK))
                    break
                except FileNotFoundError:  # whoever was in it took the empty folder away
                    continue
        except Locked as holder:
            raise RecipeError(
                f"`output_dir` {folder} is in use ({holder}): wait for the end of that, stop it, or choose another "
                "folder"
            ) from None
        except OSError as error:
            raise _cannot_write(folder, error) from error
        yield


def _claim(folder: Path, recipe: Recipe) -> OpenRun:
    """Makes the folder this recipe's, or finds it to be."""
    files = {"data": recipe.data, "eval_data": recipe.eval_data, "esft.experts": recipe.esft.get("experts")}
    files |= {"metric": recipe.metric}
    marks = {key: _digest(source) for key, source in files.items() if source}
    try:
        _bring_back(folder)  # an earlier process was killed before its run began
        found = OpenRun(folder, is_new=not (folder / RUN_RECIPE).is_file())
        if found.is_new:
            if others := sorted(path.name for path in folder.iterdir() if not _is_left_over(path.name)):
                if any(_OURS.fullmatch(name) for name in others):
                    raise RecipeError(
                        f"`output_dir` {folder} holds a run whose {RUN_RECIPE} is missing: put that back, or choose "
                        "another folder"
                    )
                raise RecipeError(
                    f"`output_dir` {folder} holds files that are not of a run: choose another folder "
                    f"(it has {others[0]})"
                )
        elif differs := _difference(folder, recipe, marks):
            if not recipe.overwrite:
                raise RecipeError(
                    f"`output_dir` {folder} holds another run ({differs}): choose another folder, or set "
                    "`overwrite: true` to delete that run"
                )
            _move_away(folder)
            found.is_new = True
        else:
            found.summary = _summary(folder)
            found.is_finished = _is_finished(folder, recipe, marks, found.summary)
        if not found.is_finished:
            write_kept(folder / DATA_MARKS, marks)
            write_text(folder / RUN_RECIPE, dump_recipe(recipe))
            remove(folder.glob("*.aside"))
            found.checkpoint = _checkpoint(folder, bool(recipe.training.get("load_best_model_at_end")))
        return found
    except OSError as error:
        raise _cannot_write(folder, error) from error


def _checkpoint(folder: Path, needs_best: bool) -> Path | None:
    """The checkpoint to go on from; what is wrong with newer ones is said."""
    unfinished = unfinished_checkpoints(folder)
    problems = [f"{path.name} was not written to its end" for path in unfinished]
    remove(unfinished)
    checkpoint, damaged = sound_checkpoint(folder, needs_best)
    if damaged and checkpoint is None:
        raise UserError(
            f"`output_dir` {folder}: {damaged[0]}, and no other checkpoint is whole: put back what it was, or delete "
            "the checkpoints to begin with the first step"
        )
    begins = f"the run goes on from {checkpoint.name}" if checkpoint else "the run begins with the first step"
    for problem in [*problems, *damaged]:
        Console().print(Text(f"{folder}: {problem}; {begins}"), soft_wrap=True)
    return checkpoint


def _difference(folder: Path, recipe: Recipe, marks: dict[str, str]) -> str:
    """What tells this recipe from the folder's, in a few words; empty if nothing does."""
    try:
        theirs = load_recipe(folder / RUN_RECIPE)
    except UserError as error:
        return f"its {RUN_RECIPE} cannot be read: {error}"
    for item in dataclasses.fields(Recipe):
        here, there = getattr(recipe, item.name), getattr(theirs, item.name)
        if item.name == "training" and recipe.global_batch_size:
            here, there = ({key: each[key] for key in each if key not in _OF_DEALING} for each in (here, there))
        is_other = item.name == "parallel" and bool(here) != bool(there)  # its checkpoints are of another kind
        if is_other or (item.name not in MAY_CHANGE and here != there):
            return _difference_of(item.name, here, there)
    try:
        known = read_kept(folder / DATA_MARKS)
    except UserError as problem:
        return f"{problem}, so nobody knows of which rows it is"
    changed = next((key for key in marks if key not in MAY_CHANGE and marks[key] != known.get(key)), None)
    what = "rows" if changed in _ROWS else "file"
    return f"the {what} of `{changed}` {'have' if changed in _ROWS else 'has'} changed since" if changed else ""


def _difference_of(key: str, here: Any, there: Any) -> str:
    """How the value of one key differs; of a section, the first of its keys that does."""
    if isinstance(here, dict) and isinstance(there, dict):
        name = next(name for name in [*here, *there] if here.get(name) != there.get(name) or name not in here)
        if name not in here or name not in there:
            whose, value = ("its", there[name]) if name in there else ("this one's", here[name])
            return f"{whose} recipe alone has `{key}.{name}`, {value!r}"
        return _difference_of(f"{key}.{name}", here[name], there[name])
    return f"its `{key}` is {there!r}, not {here!r}"


def _summary(folder: Path) -> dict[str, Any] | None:
    """What the run came to; None if it has not been at its end, or nothing can be read of it."""
    summary = read_object(folder / SUMMARY)
    if summary is None:
        return None
    for part in RESULTS:
        if summary.get(f"saved_{part}"):
            summary[f"saved_{part}"] = os.fspath(folder / part)  # it may have moved
    return summary


def _is_finished(folder: Path, recipe: Recipe, marks: dict[str, str], summary: dict[str, Any] | None) -> bool:
    """Whether everything that the recipe asks for is there, but for publishing."""
    theirs, known = load_recipe(folder / RUN_RECIPE), read_kept(folder / DATA_MARKS)
    asked = MAY_CHANGE - _NOT_IN_RESULTS
    if summary is None or marks.get("metric") != known.get("metric"):
        return False
    if any(getattr(recipe, name) != getattr(theirs, name) for name in asked):
        return False
    saved = [folder / part for part in RESULTS if summary.get(f"saved_{part}")]
    return bool(saved) and all(path.is_dir() for path in saved)


def _digest(source: str) -> str:
    """SHA-256 of the bytes of a local file or folder, empty for a Hub name."""
    return path_digest(Path(source)) if Path(source).exists() else ""


def _move_away(folder: Path) -> None:
    """Puts the run in the folder where `_bring_back` finds it."""
    (folder / _MOVING).mkdir()
    for path in _own(folder):
        os.rename(path, folder / _MOVING / path.name)
    os.rename(folder / _MOVING, folder / _REPLACED)


def _bring_back(folder: Path) -> bool:
    """Undoes `_move_away`, and removes what has come into the folder since; False if nothing was moved."""
    replaced, moving = folder / _REPLACED, folder / _MOVING
    if replaced.is_dir():
        _remove_run(folder)
        os.rename(replaced, moving)
    if not moving.is_dir():
        return False
    for path in list(moving.iterdir()):
        os.rename(path, folder / path.name)
    moving.rmdir()
    return True


def _remove_run(folder: Path) -> None:
    # The recipe last: without it, what a kill leaves would be nobody's.
    remove(sorted(_own(folder), key=lambda path: path.name == RUN_RECIPE))


def _own(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if _OURS.fullmatch(path.name)]


def _is_left_over(name: str) -> bool:
    """Of a run that was killed before its recipe was written, or of this process."""
    return name in (_LOCK, DATA_MARKS) or name.endswith(".aside")


def _cannot_write(folder: Path, error: OSError) -> RecipeError:
    return RecipeError(f"cannot write in `output_dir` {folder}: {error.strerror or error}")
