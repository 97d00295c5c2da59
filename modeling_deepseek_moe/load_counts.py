"""Tokens that each expert serves, added up where the base model and its multi-token layers have run a layer.

Behind the layer, not in it: activation checkpointing runs a layer twice, reentrant checkpointing the first time
without gradients, and a hook in it would break the graph of `torch.compile`.
"""

import torch


class LoadCountsMixin:
    """The base model's part in counting.

    Attributes:
        expert_counts: for whoever counts, an int64 tensor `[2, layers, E]` that grows with every forward pass:
            tokens served in evaluation and in training, by layer index. Training is a forward pass in training mode
            with gradients: samples drawn without them train nothing.
    """

    def __init__(self, config):
        super().__init__(config)
        self.expert_counts: list[torch.Tensor] = []

    def counts_load(self) -> bool:
        """Whether layers are to count in this forward pass.

        Raises:
            RuntimeError: `nn.DataParallel` runs it in a copy of the model.
        """
        if self.expert_counts and getattr(self, "_is_replica", False):
            raise RuntimeError(
                "experts cannot be counted under nn.DataParallel: start one process a GPU (torchrun --nproc-per-node "
                f"{torch.cuda.device_count()} ...), or let this one see a single GPU (CUDA_VISIBLE_DEVICES=0)"
            )
        return bool(self.expert_counts) and (torch.is_grad_enabled() or not self.training)

    def keep_load(self, layer: int, load: torch.Tensor | None) -> None:
        """Adds `load` `[E]`, what layer `layer` has counted."""
        for counts in self.expert_counts if load is not None else ():
            counts[int(self.training), layer] += load.to(counts.device)
