"""What the causal language model returns; after a loss in chunks its logits are computed when they are read."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from .half_products import linear


@dataclass
class DeepseekMoeCausalLMOutput(MoeCausalLMOutputWithPast):
    """Adds `mtp_loss`, the mean loss of the multi-token prediction modules before `mtp_loss_weight`."""

    mtp_loss: torch.FloatTensor | None = None


class DeferredLogits:
    """Logits `[B, T, V]` that calling this object gives; the first call computes them, later ones return the same.

    It is no tensor, so that gradient reductions and device copies pass over it. `dtype` and `float()` are there for
    accelerate, which turns half-precision outputs into float32.
    """

    def __init__(self, compute: Callable[[], torch.Tensor], dtype: torch.dtype):
        self._compute = compute
        self._logits = None
        self.dtype = dtype

    def __call__(self) -> torch.Tensor:
        if self._logits is None:
            self._logits = self._compute()
            self._compute = None
        return self._logits

    def float(self) -> "DeferredLogits":
        return DeferredLogits(lambda: self().float(), torch.float32)

    def __repr__(self) -> str:
        return f"DeferredLogits(dtype={self.dtype})"


def defer_logits(hidden_states: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> DeferredLogits:
    """The product of `hidden_states` `[B, T, H]` and the head's `weight` `[V, H]`, as it would be at this point.

    Later, that is: with the autocast and gradient modes of now, in `dtype`.

    Raises:
        RuntimeError: at the first read, where the weight has changed since (an optimizer's step).
    """
    device = hidden_states.device.type
    autocast = {"dtype": torch.get_autocast_dtype(device), "enabled": torch.is_autocast_enabled(device)}
    grad_enabled, version = torch.is_grad_enabled(), weight._version

    def compute() -> torch.Tensor:
        if weight._version != version:
            raise RuntimeError(
                "outputs.logits are computed when first read, but lm_head.weight has changed since this forward pass: "
                "read them before the optimizer's step, or set config.loss_chunk_bytes=0 to have them always"
            )
        with torch.autocast(device, **autocast), torch.set_grad_enabled(grad_enabled):
            return linear(hidden_states, weight)

    return DeferredLogits(compute, dtype)


@dataclass
class DeepseekMoeDeferredOutput(DeepseekMoeCausalLMOutput):
    """The output of a training step whose loss was computed in chunks; `logits` are computed when first read.

    Attribute, key, position, `get` and `to_tuple` give the tensor. `items()` and `values()` give a `DeferredLogits`:
    wrappers walk through these, and none of them should make the logits.
    """

    def __getattribute__(self, name):
        return _resolved(super().__getattribute__(name))

    def __getitem__(self, key):
        if isinstance(key, str):
            return _resolved(super().__getitem__(key))
        chosen = list(self)[key]
        return self[chosen] if isinstance(chosen, str) else tuple(self[name] for name in chosen)

    def get(self, key, default=None):
        return _resolved(super().get(key, default))

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in self.items())
        return f"{type(self).__name__}({fields})"


def _resolved(value):
    return value() if isinstance(value, DeferredLogits) else value
