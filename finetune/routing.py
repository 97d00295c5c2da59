"""What the routers of a model do with a set of rows, and how two sets differ in that."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from .load_counter import LoadCounter
from .recipe import RecipeError

CLAIM_FACTOR = 2
CLAIM = (
    "a set claims an expert that serves more than the even share of its tokens, and at least "
    f"{CLAIM_FACTOR} times its share of the other set's"
)


class RoutingTotals(NamedTuple):
    """Sums over all tokens of some rows, for L MoE layers of E experts.

    Attributes:
        tokens: how many.
        layers: layer indices, in the order of the rows of the others.
        counts: tokens that each expert served, `[L, E]` int64.
        weights: sums of each expert's routing weights, `[L, E]` float64.
    """

    tokens: int
    layers: list[int]
    counts: torch.Tensor
    weights: torch.Tensor

    @property
    def shares(self) -> torch.Tensor:
        """Share of the tokens' choices that went to each expert, `[L, E]` float64; 0 if there were no tokens."""
        return self.counts.double() / self.counts.sum(dim=1, keepdim=True).clamp_min(1)

    def __add__(self, other: "RoutingTotals") -> "RoutingTotals":
        """Totals of the rows of both."""
        return RoutingTotals(
            self.tokens + other.tokens, self.layers, self.counts + other.counts, self.weights + other.weights
        )


def moe_layers(model: PreTrainedModel) -> list[int]:
    """Indices of the layers with routed experts that a plain forward pass runs.

    Raises:
        RecipeError: there are none.
    """
    config = model.config
    if not config.has_experts:
        raise RecipeError(f"model {model.name_or_path!r} has no layer with routed experts")
    return [layer for layer in range(config.num_hidden_layers) if config.is_moe_layer(layer)]


def routing_totals(model: PreTrainedModel, batches: Iterable[dict[str, torch.Tensor]]) -> RoutingTotals:
    """Runs batches through a model, without its head and its multi-token prediction layers, and sums up its routing.

    Args:
        model: a DeepseekMoe model in evaluation mode, base or with a head.
        batches: `input_ids` and `attention_mask`, both `[B, T]`; tokens with mask 0 do not count.

    Raises:
        RecipeError: the model has no MoE layer, or its routing weights are not finite.
    """
    base, layers = model.base_model, moe_layers(model)
    counter = LoadCounter(base, training=False)
    sums = {
        layer: torch.zeros(router.num_experts, dtype=torch.float64, device=router.weight.device)
        for layer, router in counter.routers.items()
    }
    mask = torch.empty(0)

    def add_weights(layer: int, output: tuple[torch.Tensor, ...]) -> None:
        _, weights_NK, index_NK = output
        counted_N1 = mask.to(weights_NK.device).reshape(-1, 1)
        sums[layer].index_add_(0, index_NK.flatten(), weights_NK.double().where(counted_N1, 0.0).flatten())

    handles = [
        block.gate.register_forward_hook(lambda gate, args, output, layer=layer: add_weights(layer, output))
        for layer, block in counter.blocks.items()
    ]
    tokens = 0
    try:
        for batch in batches:
            mask = batch["attention_mask"].bool()
            tokens += int(mask.sum())
            inputs = {name: batch[name].to(base.device) for name in ("input_ids", "attention_mask")}
            with torch.inference_mode():
                base(**inputs, use_cache=False)
        counts = dict(zip(counter.blocks, counter.take().cpu(), strict=True))
    finally:
        for handle in handles:
            handle.remove()
        counter.remove()
    weights = torch.stack([sums[layer].cpu() for layer in layers])
    finite = weights.isfinite().all(dim=1).tolist()
    if not all(finite):
        dtype = str(base.dtype).removeprefix("torch.")
        raise RecipeError(
            f"the router of layer {layers[finite.index(False)]} of model {base.name_or_path!r} gives weights that are "
            f"not finite in {dtype}: try another dtype"
        )
    return RoutingTotals(tokens, layers, torch.stack([counts[layer] for layer in layers]), weights)


def share_distance(share: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Total variation distance of shares `[..., E]`, which sum to 1: 0 if they are the same, 1 if they do not meet."""
    return (share - other).abs().sum(dim=-1) / 2


def claimed_experts(share: torch.Tensor, other: torch.Tensor) -> list[int]:
    """Ids, busiest first, of the experts that a set with `share` `[E]` claims against one with `other`, by `CLAIM`."""
    claimed = (share > 1 / len(share)) & (share >= CLAIM_FACTOR * other)
    return [expert for expert in share.argsort(descending=True, stable=True).tolist() if claimed[expert]]
