"""Checkpoints of the Trainer: which of them are as they were written, and which one a run goes on from."""

import json
import os
import re
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from .seals import damage, is_sealed, seal

STATE = "trainer_state.json"


class MarkCheckpoints(TrainerCallback):
    """Marks a checkpoint when all of it is written, and only then lets older ones go.

    The last of a Trainer's callbacks that write to a checkpoint.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # The path in the checkpoint is of where the run was when it was written.
        if state.global_step and (best := best_of(Path(args.output_dir) / f"checkpoint-{state.global_step}")):
            state.best_model_checkpoint = os.path.join(args.output_dir, best)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        PartialState().wait_for_everyone()  # each process writes the state of its own random numbers
        if state.is_world_process_zero:
            seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")
            rotate_checkpoints(args.output_dir, args.save_total_limit, state.best_model_checkpoint, use_mtime=True)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in a run's folder that was written to its end; what is in it is not read."""
    return max(_marked(folder), key=_step, default=None)


def sound_checkpoint(folder: Path, needs_best: bool = False) -> tuple[Path | None, list[str]]:
    """The newest checkpoint in a run's folder that is as it was written, and what is wrong with newer ones.

    Args:
        folder: of the run.
        needs_best: the checkpoint is of no use without the best one so far, which it names.
    """
    problems = []
    for checkpoint in sorted(_marked(folder), key=_step, reverse=True):
        problem = damage(checkpoint)
        if not problem and needs_best and (best := best_of(checkpoint)) and best != checkpoint.name:
            problem = damage(folder / best)
            problem = problem and f"the best one before it, {best}, is damaged: {problem}"
        if not problem:
            return checkpoint, problems
        problems.append(f"{checkpoint.name} is damaged: {problem}")
    return None, problems


def best_of(checkpoint: Path) -> str | None:
    """The name of the best checkpoint at the time of this one, if that was looked for."""
    best = json.loads((checkpoint / STATE).read_bytes()).get("best_model_checkpoint")
    return Path(best).name if best else None


def unfinished_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that were not written to their end."""
    return [path for path in _checkpoints(folder) if not is_sealed(path)]


def _marked(folder: Path) -> list[Path]:
    return [path for path in _checkpoints(folder) if is_sealed(path)]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
