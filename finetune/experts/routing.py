"""What the routers of a model do with a set of rows, and how two sets differ in that."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import datasets
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from ..errors import UserError
from ..model.counting import LoadCounter

CLAIM_FACTOR = 2
CLAIM = (
    "a set claims an expert whose share of its tokens is above the even share and at least "
    f"{CLAIM_FACTOR} times the expert's share of the other set, whichever random half of the rows of either is taken"
)


@dataclass(frozen=True)
class RoutingTotals:
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
        """Totals of the rows of this one and of the other together."""
        return RoutingTotals(
            self.tokens + other.tokens, self.layers, self.counts + other.counts, self.weights + other.weights
        )


def moe_layers(model: PreTrainedModel) -> list[int]:
    """Indices of the layers with routed experts that a plain forward pass runs.

    Raises:
        UserError: there are none.
    """
    config = model.config
    if not config.has_experts:
        raise UserError(f"model {model.name_or_path!r} has no layer with routed experts")
    return [layer for layer in range(config.num_hidden_layers) if config.is_moe_layer(layer)]


def padded_batches(
    rows: datasets.Dataset, batch_size: int, done: Callable[[int, int], None] = lambda rows, tokens: None
) -> Iterator[dict[str, torch.Tensor]]:
    """`input_ids` and `attention_mask` `[B, T]` of `batch_size` rows each, the longest rows first.

    Args:
        rows: rows with `input_ids`.
        batch_size: B.
        done: told the number of rows and tokens of every batch that was used.
    """
    # Rows of like length together need little padding; the longest first show at once whether memory is enough.
    lengths = [len(ids) for ids in rows["input_ids"]]
    order = sorted(range(len(rows)), key=lambda row: -lengths[row])
    for start in range(0, len(order), batch_size):
        ids = [torch.tensor(rows[row]["input_ids"]) for row in order[start : start + batch_size]]
        yield {
            "input_ids": pad_sequence(ids, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        }
        done(len(ids), sum(len(row) for row in ids))


def routing_totals(model: PreTrainedModel, batches: Iterable[dict[str, torch.Tensor]]) -> RoutingTotals:
    """Runs batches through a model, without its head and its multi-token prediction layers, and sums up its routing.

    Args:
        model: a DeepseekMoe model in evaluation mode, base or with a head.
        batches: `input_ids` and `attention_mask`, both `[B, T]`; tokens with mask 0 do not count.

    Raises:
        UserError: the model has no MoE layer, or its routing weights are not finite.
    """
    base, layers = model.base_model, moe_layers(model)
    counter = LoadCounter(base)
    sums = {
        layer: torch.zeros(router.num_experts, dtype=torch.float64, device=base.device)
        for layer, router in counter.routers.items()
    }
    mask = torch.empty(0)

    def add_weights(layer: int, output: tuple[torch.Tensor, ...]) -> None:
        _, weights_NK, index_NK = output
        counted_N1 = mask.to(weights_NK.device).reshape(-1, 1)
        weights_NK = weights_NK.double().where(counted_N1, 0.0)
        sums[layer].index_add_(0, index_NK.flatten().to(base.device), weights_NK.flatten().to(base.device))

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
        counts = dict(zip(counter.blocks, counter.take(training=False).cpu(), strict=True))
    finally:
        for handle in handles:
            handle.remove()
        counter.remove()
    weights = torch.stack([sums[layer].cpu() for layer in layers])
    finite = weights.isfinite().all(dim=1).tolist()
    if not all(finite):
        dtype = str(base.dtype).removeprefix("torch.")
        raise UserError(
            f"the router of layer {layers[finite.index(False)]} of model {base.name_or_path!r} gives weights that are "
            f"not finite in {dtype}: try another dtype"
        )
    return RoutingTotals(tokens, layers, torch.stack([counts[layer] for layer in layers]), weights)


def share_distance(share: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Total variation distance of shares `[..., E]`, which sum to 1: 0 if they are the same, 1 if they do not meet."""
    return (share - other).abs().sum(dim=-1) / 2


def claimed_experts(shares: torch.Tensor, others: torch.Tensor) -> list[int]:
    """Ids of the experts that a set claims against another, by the rule in `CLAIM`; the busiest first.

    Halves must agree because chance alone gives an expert of few tokens twice the share, the oftener the more experts.

    Args:
        shares: those of the set's halves `[2, E]`, or of all its rows `[1, E]`.
        others: those of the other set, likewise.
    """
    least, most = shares.amin(dim=0), others.amax(dim=0)
    claimed = (least > 1 / len(least)) & (least >= CLAIM_FACTOR * most)
    return [expert for expert in least.argsort(descending=True, stable=True).tolist() if claimed[expert]]
