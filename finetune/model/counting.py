"""Counting the tokens that each routed expert serves."""

import re
from typing import Any

import torch
from torch import nn

from modeling_deepseek_moe.balancing import expert_load
from modeling_deepseek_moe.moe import DeepseekMoeBlock
from modeling_deepseek_moe.router import DeepseekMoeRouter

from .._compat import is_in_backward, is_replica


def blocks_of(model: nn.Module) -> dict[int, DeepseekMoeBlock]:
    """MoE blocks by layer index."""
    return {
        int(layer[1]): module
        for name, module in model.named_modules()
        if isinstance(module, DeepseekMoeBlock) and (layer := re.match(r"(?:.*\.)?layers\.(\d+)\.", name))
    }


def router_of(block: DeepseekMoeBlock) -> DeepseekMoeRouter:
    """The router in use: behind PEFT's wrapper, or the copy that PEFT trains, which comes after the original."""
    return [module for module in block.gate.modules() if isinstance(module, DeepseekMoeRouter)][-1]


class LoadCounter:
    """Counts tokens an expert in every forward pass of a model until they are taken, without the padding.

    Under `torch.compile` every counted router breaks the graph.

    Args:
        model: hooks go on its MoE blocks; it may be inside of others (PEFT, DDP).
        training: count forward passes in training mode, else those in evaluation mode. The second forward pass of
            activation checkpointing does not count.

    Attributes:
        blocks: MoE block by layer index.
        routers: the router in it, also where PEFT has wrapped it.

    Raises:
        ValueError: the model has no MoE block.
        RuntimeError: in the forward pass, if `nn.DataParallel` runs it in copies of the model.
    """

    def __init__(self, model: nn.Module, training: bool = True):
        self.training = training
        self._counts: dict[int, torch.Tensor] = {}
        self._mask: torch.Tensor | None = None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self.attach(model)

    def attach(self, model: nn.Module) -> None:
        """Counts in this model from now on, from zero, and no longer in the one before."""
        self.remove()
        self.drop()
        self.blocks = blocks_of(model)
        if not self.blocks:
            raise ValueError(f"{type(model).__name__} has no `layers` with a DeepseekMoeBlock to count in")
        self.routers = {layer: router_of(block) for layer, block in self.blocks.items()}
        # Functions, not methods: copying a module must not copy the counter and with it the model.
        for layer, block in self.blocks.items():
            self._handles += [
                block.register_forward_pre_hook(lambda _, args: self._keep_mask(args)),
                block.gate.register_forward_hook(
                    lambda gate, _, output, layer=layer: self._count(layer, gate, output)
                ),
            ]

    def take(self) -> torch.Tensor:
        """Counts `[layers, E]` (int64) since the last call, of all processes together, layers as in `blocks`."""
        router = next(iter(self.routers.values()))
        device = next((counts.device for counts in self._counts.values()), router.weight.device)
        zeros = torch.zeros(router.num_experts, dtype=torch.int64, device=device)
        stacked = torch.stack([self._counts.get(layer, zeros).to(device) for layer in self.blocks])
        self.drop()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(stacked)
        return stacked

    def drop(self) -> None:
        """Forgets what was counted."""
        self._counts.clear()

    def remove(self) -> None:
        """Takes the hooks off the model; what was counted can still be taken."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _keep_mask(self, args: tuple[Any, ...]) -> None:
        tokens = args[1] if len(args) > 1 else None
        self._mask = tokens["attention_mask"] if tokens else None

    def _count(self, layer: int, gate: nn.Module, output: tuple[torch.Tensor, ...]) -> None:
        # A backward pass is running where checkpointing computes a forward pass again.
        if gate.training != self.training or is_in_backward():
            return
        if is_replica(gate):
            raise RuntimeError(
                "experts cannot be counted under nn.DataParallel: start one process a GPU (torchrun --nproc-per-node "
                f"{torch.cuda.device_count()} ...), or let this one see a single GPU (CUDA_VISIBLE_DEVICES=0)"
            )
        mask = None if self._mask is None else self._mask.flatten()
        counts = expert_load(output[2].detach(), self.routers[layer].num_experts, mask)
        self._counts[layer] = self._counts[layer] + counts if layer in self._counts else counts
