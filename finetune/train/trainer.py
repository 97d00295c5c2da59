"""The Trainer of every run: goes on from a checkpoint, and stops before a broken loss can spoil the weights."""

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from modeling_deepseek_moe.checkpoint_layout import is_redundant
from modeling_deepseek_moe.experts import STACKED_PROJECTIONS, DeepseekMoeExperts

from .._compat import TrainerSeams, ignored_on_save
from ..errors import UserError
from ..files import write_text
from ..model.chosen_experts import is_specialized, trained_state
from ..model.lora import factors_taken_from_base
from ..model.spread import ranks_of_a_row
from ..runs.checkpoints import last_checkpoint
from ..runs.seals import COMPLETE, damage
from .held_out import TokenLossMixin
from .unlogged import KeepUnlogged

BAD_BATCH = "bad_batch{}.json"
_SCHEDULE = "scheduler.pt"  # as Trainer calls it


class RunTrainerMixin(TrainerSeams):
    """What a run adds to a Trainer class; comes before it among the bases.

    Raises:
        UserError: in `train`, when the loss or a gradient is no finite number. The weights are still those of the
            last good step; the message names the step, the file with the batch, and the last checkpoint.
    """

    def __init__(
        self,
        *,
        args: TrainingArguments,
        callbacks: list[TrainerCallback] | None = None,
        is_spread: bool = False,
        **kwargs: Any,
    ):
        self.step_times = StepTimes()
        # First what writes to checkpoints, for the last of the others seals them.
        callbacks = [KeepUnlogged(self), *(callbacks or []), self.step_times]
        self.is_spread = is_spread
        saves_only_model = args.save_only_model
        # Trainer writes no whole checkpoints of a model that was read in parts, and refuses to be asked.
        args.save_only_model = saves_only_model or is_spread
        super().__init__(args=args, callbacks=callbacks, **kwargs)
        args.save_only_model = saves_only_model
        self._batch: dict[str, Any] = {}
        self.initial_factors = factors_taken_from_base(self.model)

    def train_from(self, checkpoint: Path | None) -> None:
        """Train to the end; from a checkpoint that is already there, only restore it."""
        self.prepare_anew()
        if checkpoint is None:
            self.train()
            return
        state = TrainerState.load_from_json(os.fspath(checkpoint / "trainer_state.json"))
        if state.global_step < state.max_steps:
            if self.is_world_process_zero():
                goes_on = f"resuming from {checkpoint.name}: step {state.global_step} of {state.max_steps} is made"
                Console(highlight=False).print(goes_on)
            self.train(resume_from_checkpoint=os.fspath(checkpoint))
            return
        self.state = state
        # Which the main process wrote of itself.
        state.is_local_process_zero, state.is_world_process_zero = (
            self.is_local_process_zero(),
            self.is_world_process_zero(),
        )
        # What belongs to the weights, and what the end of training writes, is the callbacks'.
        self.control = self.callback_handler.on_train_begin(self.args, self.state, self.control)
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        self.load_weights(best or os.fspath(checkpoint))
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)

    def state_to_save(self) -> dict[str, torch.Tensor] | None:
        return trained_state(self.model) if is_specialized(self.model) else None

    def check_loaded(self, missing: list[str], unexpected: list[str]) -> None:
        """Stops where a checkpoint is not the model's, with which training would go on as it was before; transformers
        only warns, and where experts lie in several files also of tensors that it has loaded."""
        missing, unexpected = unmatched_tensors(self.model, missing, unexpected)
        if not missing and not unexpected:
            return
        problem = "lacks" if missing else "has, and the model has not,"
        names = missing or unexpected
        more = f" and {len(names) - 1} more tensors" if names[1:] else ""
        raise UserError(
            f"a checkpoint in {self.args.output_dir} {problem} {names[0]}{more}: remove the newest checkpoint, and "
            "the same command goes on from the one before"
        )

    def write_checkpoint(self, write: Callable[[], None]) -> None:
        if self.args.should_save:  # what is written over is no whole checkpoint any more
            (Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}" / COMPLETE).unlink(missing_ok=True)
        # Older ones go when this one is whole, which `MarkCheckpoints` sees to.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            write()
        finally:
            self.args.save_total_limit = limit

    def check_best(self, checkpoint: Path) -> None:
        if self.args.should_save and (problem := damage(checkpoint)):
            raise UserError(f"the best checkpoint {checkpoint} is damaged: {problem}; put back what it was")

    def write_weights(self, checkpoint: Path) -> None:
        spread_state().save_weights(self.model, checkpoint, self.rows_of_a_step)

    def read_weights(self, checkpoint: Path) -> None:
        spread_state().load_weights(self.model, checkpoint)

    def write_moments(self, checkpoint: Path) -> None:
        spread_state().save_moments(self.model, self.optimizer.optimizer, checkpoint)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), checkpoint / _SCHEDULE)

    def read_moments(self, checkpoint: Path) -> None:
        spread_state().check_rows(checkpoint, self.rows_of_a_step)
        optimizer = self.optimizer.optimizer  # which accelerate wraps
        spread_state().load_moments(self.model, optimizer, checkpoint)
        spread_state().load_schedule(self.lr_scheduler, optimizer, checkpoint / _SCHEDULE)

    @property
    def rows_of_a_step(self) -> int:
        """How many rows all processes together read for one step of the optimizer."""
        readers = self.args.world_size // ranks_of_a_row(self.model)
        return self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * readers

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        self._batch = inputs
        loss = super().training_step(model, inputs, *args, **kwargs)
        # Under loss scaling an overflow is no accident, but it is one of gradients only.
        if not math.isfinite(loss.item()):
            self.stop_broken(f"the loss became {loss.item()}")
        return loss

    def check_gradients(self, norm: torch.Tensor | float | None) -> None:
        # A finite loss can have a gradient that is not, and one optimizer step with it would ruin every weight.
        if norm is not None and not self.args.fp16:  # the loss scale looks for itself, and lowers itself
            value = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
            if not math.isfinite(value):
                self.stop_broken(f"the norm of the gradients became {value}")

    def stop_broken(self, what: str) -> None:
        """Ends training because of `what`: writes the batch to a file, and raises the UserError that names it.

        Several processes have each a batch and a file of its own.
        """
        folder, rank = Path(self.args.output_dir), self.args.process_index
        path = folder / (BAD_BATCH.format(f"-{rank}") if rank else BAD_BATCH.format(""))
        write_text(path, json.dumps(self._readable_batch(), ensure_ascii=False, indent=1) + "\n")
        saved = last_checkpoint(folder)
        raise UserError(
            f"{what} at step {self.state.global_step + 1}; the rows of the batch are in {path}; "
            + (f"the last good checkpoint is {saved}" if saved else "no checkpoint was written yet")
            + "; a smaller `training.learning_rate` may help, in another `output_dir` or with `overwrite: true`"
        )

    def _readable_batch(self) -> dict[str, Any]:
        rows = self._batch.get("input_ids")
        rows = [] if rows is None else rows.tolist()
        texts = self.processing_class.batch_decode(rows) if self.processing_class is not None else []
        return {"step": self.state.global_step + 1, "texts": texts, "input_ids": rows}


def spread_state() -> ModuleType:
    """The module of that name, which needs a transformers that can spread models."""
    from ..model import spread_state

    return spread_state


class FineTuner(RunTrainerMixin, TokenLossMixin, Trainer):
    """The Trainer of every run but those that learn from preferences."""


def unmatched_tensors(
    model: nn.Module, missing: Iterable[str], unexpected: Iterable[str]
) -> tuple[list[str], list[str]]:
    """What a checkpoint lacks and what the model has no place for, by the names that checkpoints have.

    Args:
        model: the model that was loaded into.
        missing, unexpected: names as a comparison of the model's own names with those of the files gives them.
    """
    stacks = {
        f"{module_name}.{stacked}": [f"{module_name}.{part}" for part in experts.published_parts(stacked)]
        for module_name, experts in model.named_modules()
        if isinstance(experts, DeepseekMoeExperts)
        for stacked in STACKED_PROJECTIONS
    }
    parts_of_files = set(unexpected).intersection(part for parts in stacks.values() for part in parts)
    lost = []
    for name in missing:
        parts = stacks.get(name, [])
        lost += [name] if parts_of_files.isdisjoint(parts) else [part for part in parts if part not in parts_of_files]
    # Saved models name no weight twice, and those of ESFT only what is trained.
    left_out = {*model.all_tied_weights_keys, *ignored_on_save(model)}
    other = [name for name in unexpected if name not in parts_of_files and not is_redundant(name)]
    return [name for name in lost if name not in left_out], other


class StepTimes(TrainerCallback):
    """How long the optimizer steps took, without evaluation and saving."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._begun = 0.0

    @property
    def median(self) -> float | None:
        """Seconds; the first step, which warms up, counts only if it is the only one."""
        return statistics.median(self.seconds[1:] or self.seconds) if self.seconds else None

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._begun = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self._begun)
