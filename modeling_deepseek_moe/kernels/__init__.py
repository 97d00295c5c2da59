"""Faster experts and attention, reached by name in transformers' registries and tested against the eager ones.

The model's own files never import from here: exported to the Hub they come without this folder.

    sorted/        in plain PyTorch; the default on CPU
    triton/        in Triton; README.md has what they do and what bounds them
    held_bytes.py  what the bodies of the experts keep for the backward pass and hold besides, in bytes
"""

from typing import Any

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .sorted.sorted_mm import sorted_mm_experts_forward
from .triton.mla_triton import mla_triton_attention


def register_kernels() -> None:
    """Lets "sorted_mm" and "triton" name a body of every class of transformers' experts interface."""
    ALL_EXPERTS_FUNCTIONS.register("sorted_mm", sorted_mm_experts_forward)
    ALL_EXPERTS_FUNCTIONS.register("triton", _triton_experts_forward)
    ALL_ATTENTION_FUNCTIONS.register("mla_triton", mla_triton_attention)
    # Without a mask of its own a new name would get none, and padding would be seen.
    ALL_MASK_ATTENTION_FUNCTIONS.register("mla_triton", sdpa_mask)


def _triton_experts_forward(*args: Any, **kwargs: Any) -> torch.Tensor:
    # Triton is imported where it is used: not every platform has it.
    from .triton.experts import triton_experts

    return triton_experts(*args, **kwargs)
