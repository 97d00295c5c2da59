"""Counting the tokens that each routed expert serves."""

import re
from typing import Any

import torch
from torch import nn

from modeling_deepseek_moe.balancing import expert_load
from modeling_deepseek_moe.moe import DeepseekMoeBlock


class LoadCounter:
    """Counts tokens an expert in every forward pass of a model until they are taken, without the padding.

    Args:
        model: hooks go on its MoE blocks; it may be inside of others (PEFT, DDP).
        training: count forward passes in training mode, else those in evaluation mode. The second forward pass of
            activation checkpointing does not count.

    Attributes:
        blocks: MoE block by layer index.

    Raises:
        ValueError: the model has no MoE block.
    """

    def __init__(self, model: nn.Module, training: bool = True):
        self.training = training
        self.blocks: dict[int, DeepseekMoeBlock] = {
            int(re.findall(r"layers\.(\d+)\.", name)[-1]): module
            for name, module in model.named_modules()
            if isinstance(module, DeepseekMoeBlock)
        }
        if not self.blocks:
            raise ValueError(f"{type(model).__name__} has no DeepseekMoeBlock, whose experts could be counted")
        self._counts: dict[int, torch.Tensor] = {}
        self._handles = [
            handle
            for layer, block in self.blocks.items()
            for handle in (
                block.register_forward_pre_hook(self._keep_mask),
                block.gate.register_forward_hook(lambda gate, _, output, layer=layer: self._count(layer, gate, output)),
            )
        ]

    def take(self) -> torch.Tensor:
        """Counts `[layers, E]` (int64) since the last call, of all processes together, layers as in `blocks`."""
        counts = []
        for layer, block in self.blocks.items():
            weight = block.gate.weight
            zeros = torch.zeros(block.gate.num_experts, dtype=torch.int64, device=weight.device)
            counts.append(self._counts.pop(layer, zeros))
        stacked = torch.stack([count.to(counts[0].device) for count in counts])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(stacked)
        return stacked

    def drop(self) -> None:
        """Forgets what was counted."""
        self._counts.clear()

    def remove(self) -> None:
        """Takes the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def _keep_mask(self, block: nn.Module, args: tuple[Any, ...]) -> None:
        tokens = args[1] if len(args) > 1 else None
        self._mask = tokens["attention_mask"] if tokens else None

    def _count(self, layer: int, gate: nn.Module, output: tuple[torch.Tensor, ...]) -> None:
        # A backward pass is running where checkpointing computes a forward pass again.
        if gate.training != self.training or torch._C._current_graph_task_id() != -1:
            return
        mask = None if self._mask is None else self._mask.flatten()
        counts = expert_load(output[2].detach(), gate.num_experts, mask)
        self._counts[layer] = self._counts[layer] + counts if layer in self._counts else counts
