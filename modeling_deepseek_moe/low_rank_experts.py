"""Routed experts with a low-rank update of each, forward and backward, without a tensor of the size of their weights.

N tokens, K chosen experts a token, n rows that one expert serves, E experts, H hidden size, I width of one expert,
R the ranks of all adapters together. For each expert, with w its tokens' routing weights:

    forward                                        backward
    x_nH = hidden_states[tokens]                   dy_nH = d output[tokens]
    gate_up = x W1' + t B1,  t_nR = x A1'          p_nI = dy W2 + v A2,  v_nR = dy B2'
    h_nI = SwiGLU(gate_up)                         dw = sum(p h),  dA2 = (w v)' h,  dB2 = (w u)' dy
    y_nH = h W2' + u B2,  u_nR = h A2'             d gate_up = SwiGLU'(gate_up, w p)
    output[tokens] += w y, in float32              dx = d gate_up W1 + v A1,  v_nR = d gate_up B1'
                                                   dA1 = v' x,  dB1 = t' d gate_up

Saved are gate_up, t and u; x and h are computed again. One expert after the other on CPU, so that its rows stay in the
cache; all at once, by `grouped_mm`, on CUDA, where nothing waits for the counts.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable


class Adapter(NamedTuple):
    """One adapter's factors for one stacked weight, laid out as PEFT stores them."""

    A: torch.Tensor  # [E r, in]: the ranks of one expert are neighbours
    B: torch.Tensor  # [out, r E]: the experts of one rank are neighbours
    scaling: float


def expert_lora(
    experts: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up: Sequence[Adapter],
    down: Sequence[Adapter],
) -> torch.Tensor:
    """Weighted sum of each token's adapted experts; gradients go to everything but the experts' own weights.

    Args:
        experts: has `gate_up_proj [E, 2I, H]`, `down_proj [E, H, I]` and `_apply_gate`, `[n, 2I]` -> `[n, I]`.
        hidden_states: `[N, H]`.
        top_k_index: `[N, K]` expert ids; `E` marks a slot that another rank serves.
        top_k_weights: `[N, K]`.
        gate_up, down: the adapters of each weight, whose updates add up; either may be empty.

    Returns:
        `[N, H]` in the dtype of `hidden_states`.
    """
    scalings = [adapter.scaling for adapter in gate_up], [adapter.scaling for adapter in down]
    factors = [factor for adapter in (*gate_up, *down) for factor in (adapter.A, adapter.B)]
    routing = _Routing(top_k_index, *experts.gate_up_proj.shape[:1], experts.gate_up_proj.dtype)
    inputs = (experts, routing, scalings, hidden_states, top_k_weights, *factors)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs[3:]):
        return _ExpertLora.apply(*inputs)
    return _forward(*inputs, saved=None)


class _ExpertLora(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        saved = []
        output = _forward(*inputs, saved=saved)
        ctx.constants, tensors = inputs[:3], inputs[3:]
        ctx.save_for_backward(*tensors, *saved)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        needs, tensors = ctx.needs_input_grad[3:], ctx.saved_tensors
        inputs, saved = tensors[: len(needs)], tensors[len(needs) :]
        return None, None, None, *_backward(*ctx.constants, *inputs, grad_output=grad_output, saved=saved, needs=needs)


def _forward(experts, routing, scalings, hidden_states, top_k_weights, *factors, saved):
    with torch.autocast(hidden_states.device.type, enabled=False):
        gate_up_low, down_low = _low_ranks(routing, scalings, factors)
        x_NH, w_P, output_NH = routing.inputs(hidden_states, top_k_weights)
        for segment in routing.segments:
            gate_up, t = _linear(segment.rows_of(x_NH), experts.gate_up_proj, gate_up_low, segment)
            h = experts._apply_gate(gate_up)
            y, u = _linear(h, experts.down_proj, down_low, segment)
            segment.add_up(output_NH, y * segment.weights(w_P))
            if saved is not None:
                saved += (gate_up, t, u)
        return output_NH.to(hidden_states.dtype)


def _backward(experts, routing, scalings, hidden_states, top_k_weights, *factors, grad_output, saved, needs):
    needs_x, needs_w, *needs_factors = needs
    with torch.autocast(hidden_states.device.type, enabled=False):
        gate_up_low, down_low = low_ranks = _low_ranks(routing, scalings, factors, needs_factors)
        x_NH, w_P, dx_NH = routing.inputs(hidden_states, top_k_weights)
        dy_NH, dw_P = grad_output.to(x_NH.dtype), torch.zeros_like(w_P)
        for segment, gate_up, t, u in zip(routing.segments, saved[::3], saved[1::3], saved[2::3], strict=True):
            dy, w = segment.rows_of(dy_NH), segment.weights(w_P)
            p, v = _linear_transposed(dy, experts.down_proj, down_low, segment)
            with torch.enable_grad():
                gate_up = gate_up.detach().requires_grad_()
                h = experts._apply_gate(gate_up)
            (d_gate_up,) = torch.autograd.grad(h, gate_up, (p * w).to(p.dtype))
            h = h.detach()
            if needs_w:
                dw_P[segment.pairs[: segment.count]] = (p * h).sum(-1, dtype=w.dtype)[: segment.count]
            if down_low and down_low.is_trained:
                down_low.add_gradients(segment, (v * w).to(p.dtype), h, (u * w).to(p.dtype), dy)
            weight = experts.gate_up_proj if needs_x else None
            dx, v = _linear_transposed(d_gate_up, weight, gate_up_low, segment)
            if needs_x:
                segment.add_up(dx_NH, dx)
            if gate_up_low and gate_up_low.is_trained:
                gate_up_low.add_gradients(segment, v, segment.rows_of(x_NH), t, d_gate_up)
        # Rows of pairs that are served elsewhere hold anything.
        dw_NK = dw_P.view_as(top_k_weights).masked_fill_(routing.elsewhere_NK, 0)
        gradients = [gradient for low_rank in low_ranks if low_rank for gradient in low_rank.gradients()]
        return dx_NH.to(hidden_states.dtype), dw_NK.to(top_k_weights.dtype), *gradients


class _Segment(NamedTuple):
    """Rows that one matrix product takes: those of one expert, or those of all of them on CUDA."""

    pairs: torch.Tensor  # of each row, its place in [N K]
    tokens: torch.Tensor  # of each row
    expert: int | slice
    slot: int | slice  # the expert's place among those whose factors are stacked
    count: int | None = None  # rows from here on only fill up, with weight zero
    ends: torch.Tensor | None = None  # on CUDA: [E], the row behind the last one of each expert
    places: torch.Tensor | None = None  # on CUDA: [N, K], the row of each pair, one row too many if served elsewhere

    def rows_of(self, x_NH: torch.Tensor) -> torch.Tensor:
        return x_NH.index_select(0, self.tokens)  # a third of the time of x_NH[tokens] on CPU

    def weights(self, w_P: torch.Tensor) -> torch.Tensor:
        weights = w_P[self.pairs]
        if self.count is not None:
            weights[self.count :] = 0
        return weights[:, None]

    def add_up(self, sums_NH: torch.Tensor, rows: torch.Tensor) -> None:
        if self.places is None:
            sums_NH.index_add_(0, self.tokens, rows.to(sums_NH.dtype))
        else:  # where `index_add_` adds in no fixed order
            sums_NH += F.pad(rows, (0, 0, 0, 1))[self.places].sum(1, dtype=sums_NH.dtype)


class _Routing:
    """The pairs of token and chosen expert, sorted by expert into segments."""

    def __init__(self, top_k_index: torch.Tensor, num_experts: int, dtype: torch.dtype):
        self.num_experts, self.dtype, self.elsewhere_NK = num_experts, dtype, top_k_index >= num_experts
        num_slots, device = top_k_index.shape[1], top_k_index.device
        ids, pairs = top_k_index.flatten().sort(stable=True)
        every_id = torch.arange(num_experts, device=device, dtype=ids.dtype)
        ends = torch.searchsorted(ids, every_id, right=True, out_int32=True)
        self.few: torch.Tensor | None = None
        if grouped(device):
            rows = torch.arange(len(ids), device=device).masked_fill(ids >= num_experts, len(ids))
            places = torch.empty_like(rows).index_copy_(0, pairs, rows).view_as(top_k_index)
            every = slice(None)
            self.segments = [_Segment(pairs, pairs // num_slots, every, every, None, ends, places)]
            return
        ends = ends.tolist()
        starts = [0, *ends[:-1]]
        served = [expert for expert in range(num_experts) if starts[expert] < ends[expert]]
        if 2 * len(served) < num_experts:
            self.few = torch.tensor(served, dtype=torch.long, device=device)
        self.segments = []
        for slot, expert in enumerate(served):
            rows = pairs[starts[expert] : ends[expert]]
            count = len(rows)
            if fill := _filled(count, dtype) - count:
                rows = torch.cat([rows, rows[:1].expand(fill)])
            slot = expert if self.few is None else slot
            self.segments.append(_Segment(rows, rows // num_slots, expert, slot, count))

    def inputs(self, hidden_states, top_k_weights) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens in the experts' dtype `[N, H]`, weights `[N K]`, and zeros to add rows of `[N, H]` up in."""
        dtype = torch.promote_types(self.dtype, torch.float32)
        sums = torch.zeros_like(hidden_states, dtype=dtype)
        return hidden_states.to(self.dtype), top_k_weights.flatten().to(dtype), sums


class _LowRank:
    """The factors of all adapters of one weight: A `[E, R, in]`, B `[E, R, out]` with the scaling in it.

    If few experts serve, only theirs are stacked.
    """

    def __init__(self, adapters: list[Adapter], routing: _Routing, is_trained: bool):
        self.adapters, self.routing, self.is_trained = adapters, routing, is_trained
        stacks_A, stacks_B = [], []
        for A, B, scaling in adapters:
            A, B = A.unflatten(0, (routing.num_experts, -1)), B.unflatten(1, (-1, routing.num_experts))
            if routing.few is not None:
                A, B = A.index_select(0, routing.few), B.index_select(2, routing.few)
            B = (B * scaling).to(routing.dtype)
            stacks_A.append(A.to(routing.dtype))
            # Transposed as a matrix, for which there is a fast copy.
            stacks_B.append(B.flatten(1).t().contiguous().unflatten(0, B.shape[1:]))
        self.A, B = _cat(stacks_A, 1), _cat(stacks_B, 0)
        # Rows that `grouped_mm` reads are multiples of 16 bytes.
        if grouped(B.device) and (padding := -len(B) % (16 // B.itemsize)):
            self.A, B = F.pad(self.A, (0, 0, 0, padding)), F.pad(B, (0, 0, 0, 0, 0, padding))
        self.B = B.transpose(0, 1)
        self.dA, self.dB = (torch.zeros_like(f) if is_trained else None for f in (self.A, self.B))

    def add_gradients(self, segment: _Segment, dt, x, t, dy) -> None:
        self.dA[segment.slot] = _outer(dt, x, segment.ends)
        self.dB[segment.slot] = _outer(t, dy, segment.ends)

    def gradients(self) -> Iterator[torch.Tensor | None]:
        """Of A and B of each adapter, laid out as they are."""
        start = 0
        for A, B, scaling in self.adapters:
            if not self.is_trained:
                yield from (None, None)
                continue
            rank = len(A) // self.routing.num_experts
            dA, dB = (gradient[:, start : start + rank] for gradient in (self.dA, self.dB))
            if (few := self.routing.few) is not None:
                every = self.routing.num_experts
                dA, dB = (g.new_zeros(every, *g.shape[1:]).index_copy_(0, few, g) for g in (dA, dB))
            yield dA.flatten(0, 1).to(A.dtype)
            yield dB.transpose(0, 1).flatten(0, 1).t().contiguous().to(B.dtype).mul_(scaling)
            start += rank


def _low_ranks(routing, scalings, factors, needs=()) -> list[_LowRank | None]:
    """Of gate_up and of down; None where there is no adapter. `needs` says which factors are trained."""
    low_ranks, start = [], 0
    for scalings_of_weight in scalings:
        part = slice(start, start + 2 * len(scalings_of_weight))
        adapters = [
            Adapter(*adapter)
            for adapter in zip(factors[part][::2], factors[part][1::2], scalings_of_weight, strict=True)
        ]
        low_ranks.append(_LowRank(adapters, routing, any(needs[part])) if adapters else None)
        start = part.stop
    return low_ranks


def _cat(tensors: list[torch.Tensor], dim: int) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def _linear(x, weight, low_rank, segment):
    """`x (W + B' A)'` as `[n, out]`, and `x A'`, None without low rank."""
    y = _mm_transposed(x, weight[segment.expert], segment.ends)
    if low_rank is None:
        return y, None
    t = _mm(x, low_rank.A[segment.slot].mT, segment.ends)
    return _add_mm(y, t, low_rank.B[segment.slot], segment.ends), t


def _linear_transposed(dy, weight, low_rank, segment):
    """`dy (W + B' A)` as `[n, in]`, and `dy B'`; either is None without its weight."""
    dx = None if weight is None else _mm(dy, weight[segment.expert], segment.ends)
    if low_rank is None:
        return dx, None
    v = _mm(dy, low_rank.B[segment.slot].mT, segment.ends)
    return dx if dx is None else _add_mm(dx, v, low_rank.A[segment.slot], segment.ends), v


def grouped(device: torch.device) -> bool:
    """Whether all experts are multiplied at once there; `grouped_mm` needs compute capability 8."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def _filled(count: int, dtype: torch.dtype) -> int:
    """How many rows a product of `count` rows gets.

    oneDNN, which multiplies the half-precision dtypes on CPU, prepares itself anew for every number of rows that it
    has not seen lately, for as long as many products take (1 to 13 ms each, oneDNN 3 on Xeon). Routing gives every
    number there is: multiples of 16, coarser above 128, leave a few.
    """
    if dtype.itemsize != 2:
        return count
    step = 16
    while 8 * step < count:
        step *= 2
    return -(-count // step) * step


def _mm(x, weight, ends):
    return x @ weight if ends is None else F.grouped_mm(x, weight, offs=ends)


def _mm_transposed(x, weight, ends):
    if ends is not None:
        return F.grouped_mm(x, weight.mT, offs=ends)
    if x.dtype.itemsize == 2 and len(x) <= 256:
        # oneDNN repacks its second operand: that should be the small one.
        return (weight @ x.mT).mT.contiguous()
    return x @ weight.mT


def _add_mm(y, t, weight, ends):
    return y.addmm_(t, weight) if ends is None else y.add_(F.grouped_mm(t, weight, offs=ends))


def _outer(t, x, ends):
    return t.mT.contiguous() @ x if ends is None else F.grouped_mm(t.mT, x, offs=ends)
