"""Routed experts on rows sorted by expert, with or without low-rank updates, forward and backward.

N tokens, K chosen experts a token, n rows that one expert serves, E experts, H hidden size, I width of one expert,
R the ranks of all adapters together. For each expert, with w its tokens' routing weights:

    forward                                        backward
    x_nH = hidden_states[tokens]                   dy_nH = d output[tokens]
    gate_up = x W1' + t B1,  t_nR = x A1'          p_nI = dy W2 + v A2,  v_nR = dy B2'
    h_nI = SwiGLU(gate_up)                         dw = sum(p h),  dA2 = (w v)' h,  dB2 = (w u)' dy,  dW2 = dy' (w h)
    y_nH = h W2' + u B2,  u_nR = h A2'             d gate_up = SwiGLU'(gate_up, w p)
    output[tokens] += w y, in float32              dx = d gate_up W1 + v A1,  v_nR = d gate_up B1'
                                                   dA1 = v' x,  dB1 = t' d gate_up,  dW1 = d gate_up' x

Saved are gate_up, t and u; x and h are computed again. No tensor of the size of the weights is made but the gradients
of those that are trained. One expert after the other on CPU, so that its rows stay in the cache, and where weights are
in four bits, so that one is dequantised at a time; else all at once on CUDA, by `grouped_mm`, where nothing waits for
the counts.

On CPU gate_up, h and d gate_up are stored column by column, `W x'` being the faster product than `x W'`; but row by
row where products go through float32.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.activations import SiLUActivation

from ..._compat import apply_gate, has_default_gate
from ...half_products import product
from ...large_tensors import empty
from ...quantized.weights import NF4Weight
from .low_rank import Adapter, low_ranks
from .rows import Segment, SortedRows


def sorted_experts(
    experts: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up: Sequence[Adapter] = (),
    down: Sequence[Adapter] = (),
    trained: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Weighted sum of each token's experts, adapted or not.

    Args:
        experts: has `gate_up_proj [E, 2I, H]`, `down_proj [E, H, I]`, plain or `NF4Weight`, and `_apply_gate`,
            `[n, 2I]` -> `[n, I]`.
        hidden_states: `[N, H]`.
        top_k_index: `[N, K]` expert ids; `E` marks a slot that another rank serves.
        top_k_weights: `[N, K]`.
        gate_up, down: the adapters of each weight, whose updates add up.
        trained: the first T experts once more, `[T, 2I, H]` and `[T, H, I]` in any dtype, to get the gradients in
            place of the weights of `experts`, which are frozen and hold the same values.

    Returns:
        `[N, H]` in the dtype of `hidden_states`.
    """
    scalings = [adapter.scaling for adapter in gate_up], [adapter.scaling for adapter in down]
    factors = [factor for adapter in (*gate_up, *down) for factor in (adapter.A, adapter.B)]
    weights = (experts.gate_up_proj, experts.down_proj)
    at_once = not any(isinstance(weight, NF4Weight) for weight in weights)
    routing = SortedRows(top_k_index, len(weights[0]), weights[0].dtype, at_once)
    targets, values = (weights, (None, None)) if trained is None else (trained, weights)
    inputs = (experts, routing, scalings, hidden_states, top_k_weights, *targets, *values, *factors)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs[3:]):
        return _SortedExperts.apply(*inputs)
    return _forward(*inputs, saved=None)


class _SortedExperts(torch.autograd.Function):
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


def _forward(experts, routing, scalings, hidden_states, top_k_weights, T1, T2, W1, W2, *factors, saved):
    W1, W2 = (T1, T2) if W1 is None else (W1, W2)
    with torch.autocast(hidden_states.device.type, enabled=False):
        gate_up_low, down_low = low_ranks(routing, scalings, factors)
        x_NH, w_R, output_NH = routing.inputs(hidden_states, top_k_weights)
        for segment in routing.segments:
            gate_up, t = _linear(segment.rows_of(x_NH), W1, gate_up_low, segment)
            h = apply_gate(experts, gate_up)
            y, u = _linear(h, W2, down_low, segment)
            segment.add_up(output_NH, y.contiguous() * w_R[segment.rows])
            if saved is not None:
                saved += (gate_up, t, u)
        return output_NH.to(hidden_states.dtype)


def _backward(
    experts, routing, scalings, hidden_states, top_k_weights, T1, T2, W1, W2, *factors, grad_output, saved, needs
):
    needs_x, needs_w, needs_T1, needs_T2, _, _, *needs_factors = needs
    W1, W2 = (T1, T2) if W1 is None else (W1, W2)
    with torch.autocast(hidden_states.device.type, enabled=False):
        gate_up_low, down_low = adapted = low_ranks(routing, scalings, factors, needs_factors)
        dT1, dT2 = (_no_gradient(T, routing) if n else None for T, n in ((T1, needs_T1), (T2, needs_T2)))
        x_NH, w_R, dx_NH = routing.inputs(hidden_states, top_k_weights)
        dy_NH, dw_R = grad_output.to(x_NH.dtype), torch.zeros_like(w_R[:, 0])
        for segment, gate_up, t, u in zip(routing.segments, saved[::3], saved[1::3], saved[2::3], strict=True):
            dy, w = segment.rows_of(dy_NH), w_R[segment.rows]
            p, v = _linear_transposed(dy, W2, down_low, segment)
            if segment.ends is None and not gate_up.is_contiguous():
                p = p.mT.contiguous().mT
            h, d_gate_up = _gate_backward(experts, gate_up, (p * w).to(p.dtype))
            if needs_w:
                dw_R[segment.rows] = (p * h).sum(-1, dtype=w.dtype)
            if _is_trained(dT2, segment):
                _outer(dy, (h * w).to(h.dtype), segment.ends, out=dT2[segment.expert])
            if down_low and down_low.is_trained:
                _set_factor_gradients(down_low, segment, (v * w).to(p.dtype), h, (u * w).to(p.dtype), dy)
            d_gate_up_rows = d_gate_up.contiguous()
            dx, v = _linear_transposed(d_gate_up_rows, W1 if needs_x else None, gate_up_low, segment)
            if needs_x:
                segment.add_up(dx_NH, dx)
            trains_gate_up = gate_up_low is not None and gate_up_low.is_trained
            is_trained = _is_trained(dT1, segment)
            x = segment.rows_of(x_NH) if is_trained or trains_gate_up else None
            if is_trained:
                _outer(d_gate_up, x, segment.ends, out=dT1[segment.expert])
            if trains_gate_up:
                _set_factor_gradients(gate_up_low, segment, v, x, t, d_gate_up_rows)
        dw_NK = routing.of_pairs(dw_R)
        dT1, dT2 = (dT if dT is None else dT.to(T.dtype) for dT, T in ((dT1, T1), (dT2, T2)))
        gradients = [gradient for low_rank in adapted if low_rank for gradient in low_rank.gradients()]
        dx_NH, dw_NK = dx_NH.to(hidden_states.dtype), dw_NK.to(top_k_weights.dtype)
        return dx_NH, dw_NK, dT1, dT2, None, None, *gradients


def _gate_backward(experts, gate_up, dh) -> tuple[torch.Tensor, torch.Tensor]:
    """h again, and d gate_up, stored as gate_up is."""
    is_silu = type(experts.act_fn) in (nn.SiLU, SiLUActivation)
    if not is_silu or not has_default_gate(experts):
        with torch.enable_grad():
            gate_up = gate_up.detach().requires_grad_()
            h = apply_gate(experts, gate_up)
        return h.detach(), *torch.autograd.grad(h, gate_up, dh)
    gate, up = gate_up.chunk(2, dim=-1)
    d_gate_up = torch.empty_like(gate_up)
    d_gate, d_up = d_gate_up.chunk(2, dim=-1)
    activated = F.silu(gate)
    torch.mul(dh, activated, out=d_up)
    torch.ops.aten.silu_backward.grad_input(dh * up, gate, grad_input=d_gate)
    return activated.mul_(up), d_gate_up


def _no_gradient(weight: torch.Tensor, routing: SortedRows) -> torch.Tensor:
    """Room for the gradients of all trained experts; those of experts that serve nobody are zero already."""
    gradient = empty(weight.shape, routing.dtype, weight.device)
    for expert in routing.unserved:
        if expert < len(gradient):
            gradient[expert].zero_()
    return gradient


def _is_trained(gradient: torch.Tensor | None, segment: Segment) -> bool:
    return gradient is not None and (segment.ends is not None or segment.expert < len(gradient))


def _set_factor_gradients(low_rank, segment: Segment, v, x, t, dy) -> None:
    _outer(v, x, segment.ends, out=low_rank.dA[segment.slot])
    _outer(t, dy, segment.ends, out=low_rank.dB[segment.slot])


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


def _mm(x, weight, ends):
    return product(x, weight) if ends is None else F.grouped_mm(x, weight, offs=ends)


def _mm_transposed(x, weight, ends):
    return product(weight, x.mT).mT if ends is None else F.grouped_mm(x, weight.mT, offs=ends)


def _add_mm(y, t, weight, ends):
    return product(t, weight, out=y, adds=True) if ends is None else y.add_(F.grouped_mm(t, weight, offs=ends))


def _outer(t, x, ends, out):
    """`t' x` of each expert's rows."""
    if ends is None:
        return product(t.mT.contiguous(), x, out=out)
    return out.copy_(F.grouped_mm(t.mT, x, offs=ends[: len(out)]))
