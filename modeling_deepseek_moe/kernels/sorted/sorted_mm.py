"""`experts_implementation="sorted_mm"`: one expert after the other on its own tokens, forward and backward."""

import torch
from torch import nn
from transformers.integrations.moe import grouped_mm_experts_forward

from ...quantized.weights import NF4Weight
from .experts import sorted_experts

_INTERFACE = {"has_gate": True, "has_bias": False, "is_transposed": False, "has_post_expert_norm": False}


def sorted_mm_experts_forward(
    experts: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Weighted sum of each token's experts, `[N, H]`.

    On CPU no weight is copied and none rebuilt, frozen weights get no gradient, and what the backward pass needs is
    the output of the gate and up projections only; so it is with `NF4Weight` on every device. With other weights, on
    other devices, under `torch.compile`, and on weights that are sharded or quantised otherwise, the name stands for
    transformers' `grouped_mm`, which is the same sum.

    Args:
        experts: a module of transformers' experts interface, gated and without biases.
        hidden_states: `[N, H]`.
        top_k_index: `[N, K]` expert ids; `E` marks a slot that another rank serves.
        top_k_weights: `[N, K]`.

    Raises:
        ValueError: the experts are of another kind.
    """
    if departure := interface_departure(experts):
        raise ValueError(
            f'experts_implementation="sorted_mm": {type(experts).__name__} has {departure}; use "grouped_mm"'
        )
    weights = (experts.gate_up_proj, experts.down_proj)
    if all(isinstance(weight, NF4Weight) for weight in weights):
        return sorted_experts(experts, hidden_states, top_k_index, top_k_weights)
    is_plain = all(type(weight) in (nn.Parameter, torch.Tensor) for weight in weights)
    if torch.compiler.is_compiling() or hidden_states.device.type != "cpu" or not is_plain:
        return grouped_mm_experts_forward(experts, hidden_states, top_k_index, top_k_weights)
    return sorted_experts(experts, hidden_states, top_k_index, top_k_weights)


def interface_departure(experts: nn.Module) -> str | None:
    """The flag of transformers' experts interface that is set otherwise than the products here expect, if any."""
    for flag, expected in _INTERFACE.items():
        if (value := getattr(experts, flag, expected)) != expected:
            return f"{flag}={value}"
    return None
