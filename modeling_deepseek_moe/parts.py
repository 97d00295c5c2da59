"""Which part of the model a tensor, a parameter or a module belongs to: the one table of it, by name.

| part | place in a layer | what is in it |
|---|---|---|
| `attention` | `self_attn` | linear layers `*_proj`; norms of latents and heads |
| `shared_experts` | `mlp.shared_experts` | linear layers gate, up and down |
| `dense_mlp` | `mlp`, in layers without experts | linear layers gate, up and down |
| `routed_experts` | `mlp.experts` | `gate_up_proj` and `down_proj` of all; published, gate, up and down of each |
| `router` | `mlp.gate` | its weight and selection bias |

What is in none of them: embedding, head, norms between the parts, and what joins the inputs of multi-token prediction.
"""

import re
from typing import NamedTuple


class Part(NamedTuple):
    """A row of the table; patterns are of names from `place` on, None for what the part does not have.

    Attributes:
        place: where it lies in a layer.
        modules: its linear layers in memory.
        parameters: its weights in memory that are no linear layer's.
        per_expert: the linear layers of one expert, as they are published.
    """

    place: str
    modules: str | None = None
    parameters: str | None = None
    per_expert: str | None = None


_MLP = r"(?:gate|up|down)_proj"
PARTS = {
    "attention": Part("self_attn", modules=r"self_attn\.\w+_proj(?:_with_mqa)?"),
    "shared_experts": Part("mlp.shared_experts", modules=rf"mlp\.shared_experts\.{_MLP}"),
    "dense_mlp": Part("mlp", modules=rf"mlp\.{_MLP}"),
    "routed_experts": Part(
        "mlp.experts",
        parameters=r"mlp\.experts\.(?:gate_up_proj|down_proj)",
        per_expert=rf"mlp\.experts\.\d+\.{_MLP}",
    ),
    "router": Part("mlp.gate", parameters=r"mlp\.gate\.weight"),
}
WORDS = tuple(PARTS)
# By word, the names behind `layers.N.` of linear modules, and of weights that are no linear layer's.
MODULES = {word: re.compile(part.modules) for word, part in PARTS.items() if part.modules}
PARAMETERS = {word: re.compile(part.parameters) for word, part in PARTS.items() if part.parameters}

# `mlp` is the beginning of other places: the longest that fits is meant.
_BY_PLACE = sorted(PARTS.items(), key=lambda item: -len(item[1].place))
_LINEAR = "|".join(pattern for part in PARTS.values() for pattern in (part.modules, part.per_expert) if pattern)
_LINEAR_WEIGHT = re.compile(rf"\.(?:{_LINEAR})\.weight$")
# Whatever a family calls the block around its experts.
_STACK = re.compile(r"\.experts\.(?:gate_up_proj|down_proj)$")
_EXPERT = re.compile(r"\.mlp\.experts\.(\d{1,9})\.")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d{1,9})\.")


def part_of(name: str) -> str | None:
    """The part (a word of `WORDS`) that the tensor, parameter or module of this name is in; None if it is in none."""
    dotted = f".{name}."
    return next((word for word, part in _BY_PLACE if f".{part.place}." in dotted), None)


def is_linear_weight(name: str) -> bool:
    """Whether this is the weight of a linear layer of attention or of an MLP, be it one routed expert's."""
    return _LINEAR_WEIGHT.search(name) is not None


def is_stack(name: str) -> bool:
    """Whether the parameter is the stack of one weight of all routed experts of a layer."""
    return _STACK.search(name) is not None


def layer_of(name: str) -> int | None:
    """Index of the layer that the tensor, parameter or module is in; None if it is in none."""
    found = _LAYER.search(name)
    return int(found[1]) if found else None


def expert_of(name: str) -> int | None:
    """The routed expert that a published tensor is of; None for any other tensor."""
    found = _EXPERT.search(name)
    return int(found[1]) if found else None
