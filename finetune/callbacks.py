"""What a run does between the Trainer's steps."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from modeling_deepseek_moe.balancing import expert_load, update_expert_bias

from .run_folder import mark_complete


class MarkCheckpoints(TrainerCallback):
    """Marks a checkpoint when all of it is written, so that a later run can tell it from one cut off by a kill."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            mark_complete(Path(args.output_dir) / f"checkpoint-{state.global_step}")


class BalanceExperts(TrainerCallback):
    """Moves every router's selection bias once per optimizer step (DeepSeek-V3 section 2.1.2; FACTS 3.1).

    Forward hooks keep the experts chosen in the latest forward pass, without the padding; they are counted when that
    pass's backward is over, so activation checkpointing, which runs the router twice, does not count twice. Counts of
    all processes are added up before the step.

    Args:
        model: its routers of `topk_method="noaux_tc"` are balanced, those of idle multi-token layers left alone.
        speed: gamma, 0.001 in the paper.

    Raises:
        ValueError: the model has no such router.
    """

    def __init__(self, model: nn.Module, speed: float):
        self.speed = speed
        self.routers = {name: m for name, m in model.named_modules() if hasattr(m, "e_score_correction_bias")}
        if not self.routers:
            raise ValueError("bias_update_speed moves the routers' e_score_correction_bias, which this model has not")
        self._mask: torch.Tensor | None = None
        self._latest: dict[str, torch.Tensor] = {}
        self._counts: dict[str, torch.Tensor] = {}
        model.register_forward_pre_hook(self._keep_mask, with_kwargs=True)
        for name, router in self.routers.items():
            router.register_forward_hook(lambda module, _, output, name=name: self._keep(name, module, output))

    def _keep_mask(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._mask = kwargs.get("attention_mask")

    def _keep(self, name: str, router: nn.Module, output: tuple[torch.Tensor, ...]) -> None:
        if not router.training:
            return
        chosen = output[2].detach()
        if self._mask is not None and self._mask.numel() == chosen.shape[0]:
            chosen = chosen[self._mask.flatten().bool()]
        self._latest[name] = expert_load(chosen, router.e_score_correction_bias.numel())

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        for name, count in self._latest.items():
            self._counts[name] = self._counts[name] + count if name in self._counts else count
        self._latest.clear()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.on_substep_end(args, state, control)
        for name, count in self._counts.items():
            if torch.distributed.is_initialized():
                torch.distributed.all_reduce(count)
            bias = self.routers[name].e_score_correction_bias
            with torch.no_grad():
                bias.copy_(update_expert_bias(bias, count, self.speed))
        self._counts.clear()
