"""Counting the tokens that each routed expert serves."""

import re

import torch
from torch import nn

from modeling_deepseek_moe import DeepseekMoeModel
from modeling_deepseek_moe.moe import DeepseekMoeBlock
from modeling_deepseek_moe.router import DeepseekMoeRouter

from .spread import ranks_of_a_row


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

    Those of training and of evaluation apart. Training is what has gradients: forward passes in training mode under
    `no_grad`, such as those that draw samples, count as neither. What activation checkpointing repeats counts once.

    Args:
        model: it may be inside of others (PEFT, DDP), and is on its device already.

    Attributes:
        blocks: MoE block by layer index.
        routers: the router in it, also where PEFT has wrapped it.

    Raises:
        ValueError: the model has no MoE block.
        RuntimeError: in the forward pass, if `nn.DataParallel` runs it in copies of the model.
    """

    def __init__(self, model: nn.Module):
        self._base: DeepseekMoeModel | None = None
        self.attach(model)

    def attach(self, model: nn.Module) -> None:
        """Counts in this model from now on, from zero, and no longer in the one before."""
        self.remove()
        self.blocks = blocks_of(model)
        base = next((module for module in model.modules() if isinstance(module, DeepseekMoeModel)), None)
        if base is None or not self.blocks:
            raise ValueError(f"{type(model).__name__} has no `layers` with a DeepseekMoeBlock to count in")
        self.routers = {layer: router_of(block) for layer, block in self.blocks.items()}
        router = next(iter(self.routers.values()))
        shape = (2, len(base.layers), router.num_experts)
        # A router whose weight lies on disk computes where tokens are read.
        device = base.embed_tokens.weight.device if router.weight.is_meta else router.weight.device
        self._counts = torch.zeros(shape, dtype=torch.int64, device=device)
        self._base, self._copies = base, ranks_of_a_row(base)
        base.expert_counts.append(self._counts)

    def take(self, training: bool = True) -> torch.Tensor:
        """Counts `[layers, E]` (int64) since the last call, of all processes together, layers as in `blocks`.

        Args:
            training: of training, else of evaluation.
        """
        taken = self._counts[int(training)][list(self.blocks)]
        self.drop(training)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(taken)
            taken //= self._copies  # processes of tensor parallelism count the same tokens
        return taken

    def drop(self, training: bool = True) -> None:
        """Forgets what was counted in training, or in evaluation."""
        self._counts[int(training)].zero_()

    def remove(self) -> None:
        """Counts no longer; what was counted can still be taken."""
        if self._base is not None:
            self._base.expert_counts = [counts for counts in self._base.expert_counts if counts is not self._counts]
            self._base = None
