"""Every launcher of the Triton kernels once more in plain PyTorch, one expert after the other, to test them by.

N tokens, K chosen experts a token, R = N K pairs, E experts, H hidden size, I width of one expert, r a rank. Pair
n K + k is token n's slot k. Rows are pairs sorted by expert; those whose id is E, served by another rank, come last,
are never computed and are zero here. Sums are taken in float32, or in float64 where that is given.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from .latent_decode import FP8Latent, dequantize_latent
from .pair_sorting import SortedPairs

# (t [R, r], M [E, r, out]): adds `t M[expert]` to what the weight gives
LowProduct = tuple[torch.Tensor, torch.Tensor]


def sort_pairs(top_k_index: torch.Tensor, num_experts: int) -> SortedPairs:
    """The pairs of `top_k_index [N, K]` in the order of their experts, then of their numbers."""
    ids, pairs = top_k_index.flatten().sort(stable=True)
    every_id = torch.arange(num_experts, device=ids.device, dtype=ids.dtype)
    return SortedPairs(pairs.int(), torch.searchsorted(ids, every_id, right=True, out_int32=True))


def gate_up_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    rows: SortedPairs,
    top_k: int,
    low: LowProduct | None = None,
    save: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`h = SiLU(gate) up [R, I]` of `gate_up = x W' [R, 2I]`, and gate_up itself if `save`; x is `[N, H]`.

    gate_up is rounded to the dtype of x first, so that the backward pass finds the same h.
    """
    gate_up = _product(x, weight.mT, rows, top_k, low).to(x.dtype)
    gate, up = gate_up.to(_sums_dtype(x)).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(x.dtype), gate_up if save else None


def rows_product(
    a: torch.Tensor,
    weight: torch.Tensor,
    rows: SortedPairs,
    *,
    transposed: bool,
    gather: int = 0,
    scatter: bool = False,
    row_weights: torch.Tensor | None = None,
    low: LowProduct | None = None,
) -> torch.Tensor:
    """`a W'` for a weight `[E, out, in]` if `transposed`, else `a W` for one `[E, in, out]`: `[R, out]`.

    Args:
        a: `[N, in]` where `gather` is K, else `[R, in]` in the order of `rows`.
        weight: each expert's.
        rows: who serves which pair.
        transposed: how the weight lies.
        gather: K if a holds tokens.
        scatter: whether each result lies at its pair instead of its row.
        row_weights: `[R]` by pair, a factor of each result.
        low: added before it.
    """
    y = _product(a, weight.mT if transposed else weight, rows, gather, low)
    if row_weights is not None:
        y *= row_weights[rows.pairs].to(y.dtype)[:, None]
    return _by_pair(y, rows).to(a.dtype) if scatter else y.to(a.dtype)


def gate_backward(
    dy: torch.Tensor,
    weight: torch.Tensor,
    gate_up: torch.Tensor,
    row_weights: torch.Tensor,
    rows: SortedPairs,
    top_k: int,
    low: LowProduct | None = None,
    save_h: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Back through the down product and SwiGLU.

    `p = dy W`, `d gate_up = SwiGLU'(gate_up, w p)` and `dw = sum(p h)`, with h computed again and w the routing
    weights.

    Args:
        dy: `[N, H]`.
        weight: `[E, H, I]`.
        gate_up: `[R, 2I]`.
        row_weights: `[R]` by pair.
        rows, top_k: who serves which pair; K.
        low: added to p.
        save_h: whether `w h` is wanted.

    Returns:
        d gate_up `[R, 2I]`, `w h [R, I]` or None, dw `[R]` by pair, unrounded.
    """
    p = _product(dy, weight, rows, top_k, low)
    gate, up = gate_up.to(p.dtype).chunk(2, dim=-1)
    sigmoid = gate.sigmoid()
    h = gate * sigmoid * up
    w = row_weights[rows.pairs].to(p.dtype)[:, None]
    dh = w * p
    d_gate_up = torch.cat((dh * up * sigmoid * (1 + gate * (1 - sigmoid)), dh * gate * sigmoid), -1)
    d_gate_up[_num_served(rows) :] = 0
    return d_gate_up.to(dy.dtype), (w * h).to(dy.dtype) if save_h else None, _by_pair((p * h).sum(-1), rows)


def weight_gradient(
    left: torch.Tensor,
    right: torch.Tensor,
    rows: SortedPairs,
    *,
    gather_left: int = 0,
    gather_right: int = 0,
    row_weights: torch.Tensor | None = None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`left' (w right)` over each expert's rows: `[E, left width, right width]`, zero where an expert serves nobody.

    Args:
        left, right: `[N, width]` where gathered, else `[R, width]`.
        rows: who serves which pair.
        gather_left, gather_right: K if the side holds tokens.
        row_weights: w `[R]` by pair.
        dtype: type of the result.
    """
    sums = _sums_dtype(left)
    gradient = left.new_zeros(len(rows.ends), left.shape[-1], right.shape[-1], dtype=dtype)
    for expert, part in _served(rows):
        left_rows = _rows_of(left, rows, part, gather_left).to(sums)
        right_rows = _rows_of(right, rows, part, gather_right).to(sums)
        if row_weights is not None:
            right_rows = right_rows * row_weights[rows.pairs[part]].to(sums)[:, None]
        gradient[expert] = left_rows.mT @ right_rows
    return gradient


def sum_pairs(
    y: torch.Tensor, top_k_index: torch.Tensor, num_experts: int, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """`y [R, H]` by pair summed over each token's pairs whose id is not E: `[N, H]`, in the dtype of y if none."""
    is_served = (top_k_index != num_experts)[..., None]
    of_pairs = y.view(*top_k_index.shape, y.shape[-1]).to(_sums_dtype(y))
    return of_pairs.where(is_served, 0).sum(1).to(y.dtype if dtype is None else dtype)


def latent_attention(
    queries: torch.Tensor,
    cached: torch.Tensor | FP8Latent,
    rank: int,
    scaling: float,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """What `[B, h, T, c + rope]` queries read from the cached tokens `[B, L, c + rope]`: `[B, h, T, c]`.

    Args:
        queries, cached: in the latent space; of the cache the first c numbers are summed.
        rank: c.
        scaling: factor on the scores.
        mask: bool `[B, T, L]`; a query that sees nothing gets zeros. None: the last query sees everything, and each
            one before it one token less.
    """
    if isinstance(cached, FP8Latent):
        cached = dequantize_latent(cached)
    dtype = _sums_dtype(queries)
    cached = cached[:, None].to(dtype)
    scores = queries.to(dtype) @ cached.mT * scaling
    if mask is None:
        tokens, length = scores.shape[-2:]
        mask = torch.ones(1, tokens, length, dtype=torch.bool, device=scores.device).tril(length - tokens)
    weights = scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1).nan_to_num(0)
    return (weights @ cached[..., :rank]).to(queries.dtype)


def _product(a, weight, rows, gather, low) -> torch.Tensor:
    """`a W` of all rows, `[R, out]`, with `t M` added."""
    dtype = _sums_dtype(a)
    product = a.new_zeros(len(rows.pairs), weight.shape[-1], dtype=dtype)
    for expert, part in _served(rows):
        product[part] = _rows_of(a, rows, part, gather).to(dtype) @ weight[expert].to(dtype)
        if low is not None:
            t, M = low
            product[part] += t[part].to(dtype) @ M[expert].to(dtype)
    return product


def _served(rows: SortedPairs) -> Iterator[tuple[int, slice]]:
    start = 0
    for expert, end in enumerate(rows.ends.tolist()):
        if start < end:
            yield expert, slice(start, end)
        start = end


def _num_served(rows: SortedPairs) -> int:
    return int(rows.ends[-1])


def _rows_of(side, rows, part, gather) -> torch.Tensor:
    return side[rows.pairs[part] // gather] if gather else side[part]


def _by_pair(of_rows: torch.Tensor, rows: SortedPairs) -> torch.Tensor:
    return torch.zeros_like(of_rows).index_copy_(0, rows.pairs.long(), of_rows)


def _sums_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
