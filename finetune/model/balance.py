"""What a run does between the Trainer's steps."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from modeling_deepseek_moe.balancing import update_expert_bias

from ..runs.folder import mark_complete
from .counting import LoadCounter


class MarkCheckpoints(TrainerCallback):
    """Marks a checkpoint when all of it is written, so that a later run can tell it from one cut off by a kill."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            mark_complete(Path(args.output_dir) / f"checkpoint-{state.global_step}")


class BalanceExperts(TrainerCallback):
    """Moves every router's selection bias once per optimizer step (DeepSeek-V3 section 2.1.2; FACTS 3.1, T28).

    Counts come from the whole global batch: all micro-batches, without padding, of all processes, and only what has
    gradients. In a loop without Trainer, call `step()` after every `optimizer.step()`, and `counter.remove()` when
    training is over; a Trainer ends the counting by itself.

    Args:
        model: its routers of `topk_method="noaux_tc"` are balanced; idle multi-token layers are left alone.
        speed: gamma, 0.001 in the paper; may be set to another value between steps.
        rule: "sign" or "proportional", see `update_expert_bias`.

    Attributes:
        watchers: functions that get the counts `[layers, E]` of every step too.

    Raises:
        ValueError: the model has no such router, or in `step` no float32 bias.
    """

    def __init__(self, model: nn.Module, speed: float, rule: str = "sign"):
        self.speed, self.rule = speed, rule
        self.counter = LoadCounter(model)
        self.watchers: list[Callable[[torch.Tensor], None]] = []
        if not all(hasattr(router, "e_score_correction_bias") for router in self.counter.routers.values()):
            self.counter.remove()
            raise ValueError("the bias step moves the routers' e_score_correction_bias, which this model has not")

    @torch.no_grad()
    def step(self) -> None:
        """Moves the biases by the counts since the last call."""
        taken = self.counter.take()
        for watcher in self.watchers:
            watcher(taken)
        for (layer, router), counts in zip(self.counter.routers.items(), taken, strict=True):
            bias = router.e_score_correction_bias
            if bias.dtype != torch.float32:
                raise ValueError(
                    f"the e_score_correction_bias of layer {layer} is {bias.dtype}, where small steps are lost: keep "
                    "it float32 (FSDP of version 1 casts buffers: set buffer_dtype to float32, or use version 2)"
                )
            bias.copy_(update_expert_bias(bias, counts.to(bias.device), self.speed, self.rule))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        # The Trainer may have wrapped or replaced the model, and what ran before belongs to no step.
        self.counter.attach(model)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if getattr(kwargs.get("optimizer"), "step_was_skipped", False):
            self.counter.drop()  # the loss scale overflowed
        else:
            self.step()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.counter.remove()
