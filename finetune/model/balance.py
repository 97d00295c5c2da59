"""The routers' selection biases while a model trains: moved once a step, and kept in the checkpoints of adapters."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from modeling_deepseek_moe.balancing import update_expert_bias

from ..files import replaced
from .counting import LoadCounter, blocks_of, router_of

_FILE, _KEY = "router_biases.safetensors", "layers.{}.mlp.gate.e_score_correction_bias"


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


class KeepRouterBiases(TrainerCallback):
    """Saves the routers' selection biases in each checkpoint of a PEFT run, whose other files hold the adapter only.

    A run takes them from the checkpoint that it goes on from, or that it ends with as the best.
    """

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            biases = {
                _KEY.format(i): router_of(block).e_score_correction_bias for i, block in blocks_of(model).items()
            }
            with replaced(Path(args.output_dir) / f"checkpoint-{state.global_step}" / _FILE) as path:
                save_file({name: bias.cpu().contiguous() for name, bias in biases.items()}, path)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        if state.global_step:
            restore_router_biases(model, Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint:
            restore_router_biases(model, Path(state.best_model_checkpoint))


@torch.no_grad()
def restore_router_biases(model: nn.Module, checkpoint: Path) -> None:
    """Sets the biases to those of the checkpoint, if it has any apart from the model's weights."""
    if (checkpoint / _FILE).is_file():
        biases = load_file(checkpoint / _FILE)
        for layer, block in blocks_of(model).items():
            router_of(block).e_score_correction_bias.copy_(biases[_KEY.format(layer)])
