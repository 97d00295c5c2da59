"""Which neurons of a dense SwiGLU feed-forward make an expert together, and the router that goes with them.

The output of the feed-forward is a sum over neurons, so any grouping keeps it as long as all groups count. Neurons
whose gate rows point the same way are active for the same tokens: grouping them lets a router that looks for that
direction leave out what a token needs least (the idea of MoEfication, arXiv 2110.01786).

All sums here are of whole numbers that float32 holds exactly, so that the result is the same bit for bit on every
machine and for every number of threads.

I neurons, H hidden size, G groups.
"""

import math

import torch

# Rows become whole numbers of about this norm; a product of two then stays below 2^24 whatever the order of its sum.
_UNIT = 2048
_STEPS = 2**15
_ROUNDS = 12
_ROWS_AT_ONCE = 2048


def group_neurons(gate: torch.Tensor, norm: torch.Tensor, shared: int, groups: int, width: int) -> torch.Tensor:
    """Neuron ids `[I]` in their new order: those of the shared experts, then every routed expert's.

    Args:
        gate: rows of `gate_proj`, `[I, H]`, finite.
        norm: weight of the norm in front of the feed-forward, `[H]`.
        shared: how many neurons the shared experts have; the first ones.
        groups: routed experts.
        width: neurons of each.
    """
    group_of = cluster_evenly(unit_rows(gate[shared:], norm), groups, width)
    return torch.cat((torch.arange(shared), shared + group_of.argsort(stable=True)))


def router_rows(gate: torch.Tensor, norm: torch.Tensor, groups: int, spread: float) -> torch.Tensor:
    """Router `[G, H]`, float32: the mean gate row of each group, less that of all, on a scale of its own.

    Args:
        gate: rows of `gate_proj` of all groups, one group after the other, `[I, H]`.
        norm: weight of the norm in front of the feed-forward, `[H]`.
        groups: routed experts.
        spread: standard deviation of the logits if normalised activations are independent, within a factor of 2.
    """
    largest = gate.abs().max().float().clamp(min=1e-38)
    sums = [(some.float() / largest * _STEPS).round().sum(0, dtype=torch.float64) for some in gate.chunk(groups)]
    rows = groups * torch.stack(sums) - sum(sums)
    typical = float((rows * norm.double()).square().sum(1).mean().sqrt())
    if not typical:
        return rows.float()
    # A power of two, so that the last bits of this sum do not show in the rows.
    return (rows * 2.0 ** math.floor(math.log2(spread / typical))).float()


def unit_rows(gate: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """What the rows of `gate [I, H]` look for behind `norm [H]`, as directions of whole numbers; zeros stay zeros."""
    result = torch.empty(gate.shape, dtype=torch.float32)
    for some, out in zip(gate.split(_ROWS_AT_ONCE), result.split(_ROWS_AT_ONCE), strict=True):
        rows = some.float() * norm.float()
        largest = rows.abs().amax(1, keepdim=True).clamp(min=1e-38)
        out.copy_(_with_unit_norm((rows / largest * _UNIT).round()))
    return result


def cluster_evenly(rows: torch.Tensor, groups: int, width: int) -> torch.Tensor:
    """Group `[I]` of each row: spherical k-means in which all groups have `width` members.

    Args:
        rows: what `unit_rows` gives, `[I, H]`.
        groups: their number.
        width: `I / groups`.
    """
    centers = rows[torch.arange(groups) * width]
    group_of = None
    for _ in range(_ROUNDS):
        before, group_of = group_of, _assign_evenly(rows @ centers.T, width)
        if before is not None and torch.equal(before, group_of):
            break
        sums = [rows[group_of == group].sum(0, dtype=torch.float64) for group in range(groups)]
        centers = _with_unit_norm(torch.stack(sums))
    return group_of


def _assign_evenly(affinity: torch.Tensor, width: int) -> torch.Tensor:
    """Group `[I]` for affinities `[I, G]`: each row asks for its best open group, which takes the closest of them."""
    group_of = torch.full((len(affinity),), -1)
    places = torch.full((affinity.shape[1],), width)
    waiting = torch.arange(len(affinity))
    while len(waiting):
        closed = torch.where(places > 0, 0.0, -math.inf)
        score, wish = (affinity[waiting] + closed).max(1)
        order = score.argsort(descending=True, stable=True)
        order = order[wish[order].argsort(stable=True)]
        asked = wish.bincount(minlength=len(places))
        rank = torch.arange(len(order)) - (asked.cumsum(0) - asked)[wish[order]]
        taken = rank < places[wish[order]]
        group_of[waiting[order[taken]]] = wish[order[taken]]
        places -= torch.minimum(asked, places)
        waiting = (group_of < 0).nonzero().flatten()
    return group_of


def _with_unit_norm(numbers: torch.Tensor) -> torch.Tensor:
    """Rows of whole numbers, rounded to the norm `_UNIT`; float32."""
    norm = numbers.square().sum(1, keepdim=True, dtype=torch.float64).sqrt()
    return (numbers / norm.clamp(min=1) * _UNIT).round().float()
