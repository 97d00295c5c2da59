"""What a run has not logged yet, kept in its checkpoints: a run that goes on between two logs writes the same ones."""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .._compat import TrainerSeams
from ..files import write_text

_FILE = "unlogged.json"


class KeepUnlogged(TrainerCallback):
    """Keeps the sum of the losses since the last log; with several processes, the mean of their sums."""

    def __init__(self, trainer: TrainerSeams):
        self._trainer = trainer

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        loss, since = self._trainer.unlogged
        processes = PartialState().num_processes
        if processes > 1:
            loss = loss.clone()
            torch.distributed.all_reduce(loss)
            loss /= processes
        if state.is_world_process_zero:
            write_text(_path(args, state), json.dumps({"loss": loss.item(), "since": since}) + "\n")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        path = _path(args, state)
        if self._trainer.is_in_train and state.global_step and path.is_file():
            kept = json.loads(path.read_bytes())
            self._trainer.go_on_logging(kept["loss"], kept["since"])


def _path(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}" / _FILE
