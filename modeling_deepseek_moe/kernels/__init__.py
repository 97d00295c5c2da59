"""Faster bodies of the routed experts, reached by name in transformers' registry and tested against the eager one.

The model's own files never import from here: exported to the Hub they come without this folder.
"""

from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .sorted_mm import sorted_mm_experts_forward


def register_kernels() -> None:
    """Lets `experts_implementation="sorted_mm"` name the body for every class of transformers' experts interface."""
    ALL_EXPERTS_FUNCTIONS.register("sorted_mm", sorted_mm_experts_forward)
