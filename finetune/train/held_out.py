"""The loss on held-out rows, the same on any number of processes, and what is measured before the first step."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from ..model.spread import ranks_of_a_row


class TokenLossMixin:
    """Makes a Trainer's `eval_loss` the mean over all tokens with a target; comes before the Trainer among the bases.

    The Trainer's own is a mean of the batches' means, which changes with their number and with that of the processes.
    The model's loss is to be the mean over the targets of its batch.
    """

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        self._held_out = torch.zeros(2, dtype=torch.float64)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        loss, tokens = self.accelerator.reduce(self._held_out.to(self.args.device)).tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = loss / tokens if tokens else float("nan")
        return output

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        rows = len(inputs["labels"])
        real = self._real_rows(rows)
        if 0 < real < rows:
            inputs = {name: value[:real] for name, value in inputs.items()}
        loss, logits, labels = super().prediction_step(model, inputs, *args, **kwargs)
        tokens = int((inputs["labels"][..., 1:] != -100).sum())
        if real and tokens:
            self._held_out += torch.tensor([loss.item() * tokens, tokens], dtype=torch.float64)
        return loss, logits, labels

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if not model.training:
            kwargs["num_items_in_batch"] = None  # which is of all processes together
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _real_rows(self, rows: int) -> int:
        """How many of this process's rows are no repetitions, by which accelerate fills the last batches up."""
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return rows
        return min(rows, max(0, state.remainder - self.args.process_index // ranks_of_a_row(self.model) * rows))


class MeasureFirst(TrainerCallback):
    """Measures a model before its first step, when the Trainer has spread its weights over the processes.

    accelerate and DeepSpeed do that for a model and its optimizer together, so not before training.

    Args:
        measure: evaluates with the Trainer, whose log keeps nothing of it.
    """

    def __init__(self, measure: Callable[[], None]):
        self._measure = measure

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logged = len(state.log_history)
        self._measure()
        del state.log_history[logged:]
