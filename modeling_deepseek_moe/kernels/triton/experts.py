"""`experts_implementation="triton"`: the routed experts, with or without low-rank updates, as Triton kernels on GPUs.

The products are those written down in `sorted_experts`, all experts at once, by the launchers whose plain PyTorch
counterparts are in `reference`. One operator computes the forward pass, one the backward pass, so that
`torch.compile` sees two calls. Rows are gathered where a product reads them and scattered where it writes them;
SwiGLU, routing weights and the second low-rank product are part of the products beside them. For R = N K pairs:

    forward                                         reads               writes
    t    = x A1'                                    x [N, H]            t [R, r]
    h    = SwiGLU(x W1' + t B1)                     x [N, H], t         h [R, I], gate_up [R, 2I] if it is saved
    u    = h A2'                                    h                   u [R, r]
    y    = w (h W2' + u B2)                         h, u                y [R, H], by pair
    output = sum of a token's y                     y                   output [N, H]

    backward
    v    = dy B2'                                   dy [N, H]           v [R, r]
    p    = dy W2 + v A2, d gate_up, h, dw           dy, v, gate_up      d gate_up [R, 2I], w h [R, I] if needed, dw [R]
    dW2  = dy' (w h), dA2 = v' (w h), dB2 = (w u)' dy
    v    = d gate_up B1'                            d gate_up           v [R, r]
    dx   = d gate_up W1 + v A1                      d gate_up, v        dx [R, H], by pair, then its sums [N, H]
    dW1  = d gate_up' x, dA1 = v' x, dB1 = t' d gate_up

Saved beside the inputs are gate_up, t and u. Nothing waits for the device, and no shape depends on the routing.
"""

from collections.abc import Sequence

import torch
from torch import nn
from transformers.activations import SiLUActivation

from ..._compat import has_default_gate, is_traceable_wrapper_subclass
from ...quantized.weights import NF4Weight
from ..sorted.low_rank import Adapter, EveryExpert, low_ranks, padded_rank
from ..sorted.sorted_mm import interface_departure
from .launch import refusal

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_WIDTHS = 16


def triton_experts(
    experts: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up: Sequence[Adapter] = (),
    down: Sequence[Adapter] = (),
) -> torch.Tensor:
    """Weighted sum of each token's experts, adapted or not.

    Frozen weights get no gradient. Products are computed in the dtype of the weights, summed in float32.

    Args:
        experts: SwiGLU experts with `gate_up_proj [E, 2I, H]` and `down_proj [E, H, I]` in float16, bfloat16 or
            float32, H and I multiples of 16.
        hidden_states: `[N, H]`.
        top_k_index: `[N, K]` expert ids; `E` marks a slot that another rank serves.
        top_k_weights: `[N, K]`.
        gate_up, down: the adapters of each weight, whose updates add up.

    Returns:
        `[N, H]` in the dtype of `hidden_states`.

    Raises:
        ValueError: Triton's kernels cannot run there, or not on these experts.
    """
    if reason := refusal(hidden_states.device):
        raise ValueError(f'experts_implementation="triton": {reason}; use "sorted_mm" or "grouped_mm"')
    if departure := _departure(experts):
        raise ValueError(f'experts_implementation="triton": {departure}')
    factors = [factor for adapter in (*gate_up, *down) for factor in (adapter.A, adapter.B)]
    scalings = [float(adapter.scaling) for adapter in (*gate_up, *down)]
    inputs = (hidden_states, top_k_index, top_k_weights, experts.gate_up_proj, experts.down_proj)
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*inputs, *factors))
    return _experts(*inputs, factors, scalings, len(gate_up), save)[0]


def _departure(experts: nn.Module) -> str | None:
    """What keeps these experts from being served, and what serves them."""
    if departure := interface_departure(experts):
        return f'{type(experts).__name__} has {departure}; use "grouped_mm"'
    if type(experts.act_fn) not in (nn.SiLU, SiLUActivation):
        return f'the activation is {type(experts.act_fn).__name__}, not SiLU; use "sorted_mm" or "grouped_mm"'
    if not has_default_gate(experts):
        return f'{type(experts).__name__} multiplies gate and up in its own way; use "sorted_mm" or "grouped_mm"'
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(experts, name)
        if isinstance(weight, NF4Weight):
            return f'{name} is in four bits (NF4Weight); use "sorted_mm"'
        if is_traceable_wrapper_subclass(weight):
            return f'{name} is sharded or quantised ({type(weight).__name__}); use "grouped_mm"'
        if weight.dtype not in _DTYPES:
            return f'{name} is {weight.dtype}, not float16, bfloat16 or float32; use "sorted_mm"'
        if weight.shape[-1] % _WIDTHS:
            return (
                f"{name} has shape {list(weight.shape)}, whose last dimension is no multiple of {_WIDTHS}; "
                'use "sorted_mm" or "grouped_mm"'
            )
    if experts.gate_up_proj.dtype != experts.down_proj.dtype:
        return f'the weights are {experts.gate_up_proj.dtype} and {experts.down_proj.dtype}; use "eager"'
    return None


@torch.library.custom_op("deepseek_moe::experts", mutates_args=())
def _experts(
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    factors: list[torch.Tensor],
    scalings: list[float],
    num_gate_up: int,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The output, then gate_up, t and u for the backward pass, empty where not saved or without adapters.

    Args:
        factors: A and B of every adapter, those of gate_up first.
        scalings: one for every adapter.
        num_gate_up: how many adapt gate_up.
        save: whether a backward pass will follow.
    """
    from .gate_up import gate_up_product
    from .grouped_gemm import rows_product
    from .pair_sorting import sort_pairs, sum_pairs

    with torch.no_grad(), torch.autocast(hidden_states.device.type, enabled=False):
        x, index, w, W1, W2 = _prepared(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj)
        low1, low2 = _low_ranks(W1, factors, scalings, num_gate_up)
        num_experts, top_k = len(W1), index.shape[1]
        rows = sort_pairs(index, num_experts)
        t = low1 and rows_product(x, low1.A, rows, transposed=True, gather=top_k)
        h, gate_up = gate_up_product(x, W1, rows, top_k, low=low1 and (t, low1.B), save=save)
        u = low2 and rows_product(h, low2.A, rows, transposed=True)
        y = rows_product(h, W2, rows, transposed=True, scatter=True, row_weights=w, low=low2 and (u, low2.B))
        output = sum_pairs(y, index, num_experts, dtype=hidden_states.dtype)
        saved = (tensor if save and tensor is not None else W1.new_empty(0) for tensor in (gate_up, t, u))
        return output, *saved


@_experts.register_fake
def _experts_shapes(
    hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, factors, scalings, num_gate_up, save
):
    rows, (num_experts, width, _) = top_k_index.numel(), gate_up_proj.shape
    shapes = [(rows, width) if save else (0,)]
    for A in (factors[: 2 * num_gate_up : 2], factors[2 * num_gate_up :: 2]):
        rank = padded_rank(sum(len(a) for a in A) // num_experts, gate_up_proj.dtype)
        shapes.append((rows, rank) if save and A else (0,))
    return hidden_states.new_empty(hidden_states.shape), *(gate_up_proj.new_empty(shape) for shape in shapes)


@torch.library.custom_op("deepseek_moe::experts_backward", mutates_args=())
def _experts_backward(
    grad_output: torch.Tensor,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    factors: list[torch.Tensor],
    scalings: list[float],
    num_gate_up: int,
    gate_up: torch.Tensor,
    t: torch.Tensor,
    u: torch.Tensor,
    needs: list[bool],
) -> list[torch.Tensor]:
    """The gradients that `needs` asks for, of hidden states, routing weights, both weights and every factor."""
    from .gate_up import gate_backward
    from .grouped_gemm import rows_product
    from .pair_sorting import sort_pairs, sum_pairs
    from .weight_gradient import weight_gradient

    needs_x, needs_w, needs_W1, needs_W2, *needs_factors = needs
    dx = dW1 = dW2 = None
    with torch.no_grad(), torch.autocast(hidden_states.device.type, enabled=False):
        x, index, w, W1, W2 = _prepared(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj)
        low1, low2 = _low_ranks(W1, factors, scalings, num_gate_up, needs_factors)
        trains1, trains2 = (low is not None and low.is_trained for low in (low1, low2))
        num_experts, top_k = len(W1), index.shape[1]
        rows = sort_pairs(index, num_experts)
        dy = grad_output.to(W1.dtype).contiguous()
        v = low2 and rows_product(dy, low2.B, rows, transposed=True, gather=top_k)
        d_gate_up, wh, dw = gate_backward(
            dy, W2, gate_up, w, rows, top_k, low=low2 and (v, low2.A), save_h=needs_W2 or trains2
        )
        if needs_W2:
            dW2 = weight_gradient(dy, wh, rows, gather_left=top_k, dtype=W2.dtype)
        if trains2:
            low2.dA = weight_gradient(v, wh, rows, dtype=torch.float32)
            low2.dB = weight_gradient(u, dy, rows, gather_right=top_k, row_weights=w, dtype=torch.float32)
        del wh
        v = rows_product(d_gate_up, low1.B, rows, transposed=True) if low1 and (trains1 or needs_x) else None
        if needs_W1:
            dW1 = weight_gradient(d_gate_up, x, rows, gather_right=top_k, dtype=W1.dtype)
        if trains1:
            low1.dA = weight_gradient(v, x, rows, gather_right=top_k, dtype=torch.float32)
            low1.dB = weight_gradient(t, d_gate_up, rows, dtype=torch.float32)
        if needs_x:
            dx = rows_product(d_gate_up, W1, rows, transposed=False, scatter=True, low=low1 and (v, low1.A))
            dx = sum_pairs(dx, index, num_experts, dtype=hidden_states.dtype)
        dw = dw.view(index.shape).to(top_k_weights.dtype)
        of_factors = [gradient for low in (low1, low2) if low for gradient in low.gradients()]
        gradients = (dx, dw, dW1, dW2, *of_factors)
        return [gradient for gradient, needed in zip(gradients, needs, strict=True) if needed]


@_experts_backward.register_fake
def _experts_backward_shapes(
    grad_output,
    hidden_states,
    top_k_index,
    top_k_weights,
    gate_up_proj,
    down_proj,
    factors,
    scalings,
    num_gate_up,
    gate_up,
    t,
    u,
    needs,
):
    targets = (hidden_states, top_k_weights, gate_up_proj, down_proj, *factors)
    return [target.new_empty(target.shape) for target, needed in zip(targets, needs, strict=True) if needed]


def _save(ctx, inputs, output) -> None:
    *tensors, factors, ctx.scalings, ctx.num_gate_up, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *factors, *output[1:])


def _backward(ctx, grad_output, *_):
    needs_x, _, needs_w, needs_W1, needs_W2, needs_factors, *_ = ctx.needs_input_grad
    needs = [needs_x, needs_w, needs_W1, needs_W2, *needs_factors]
    tensors = ctx.saved_tensors  # read once, as checkpointing wants it
    inputs, factors, saved = tensors[:5], list(tensors[5:-3]), tensors[-3:]
    found = iter(_experts_backward(grad_output, *inputs, factors, ctx.scalings, ctx.num_gate_up, *saved, needs))
    dx, dw, dW1, dW2, *of_factors = (next(found) if needed else None for needed in needs)
    # An empty list counts as one of tensors.
    return dx, None, dw, dW1, dW2, of_factors, None if ctx.scalings else [], None, None


_experts.register_autograd(_backward, setup_context=_save)


def _prepared(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj):
    """Tokens in the weights' dtype, ids, routing weights by pair, weights: as they lie in memory for the kernels."""
    return (
        hidden_states.to(gate_up_proj.dtype).contiguous(),
        top_k_index.contiguous(),
        top_k_weights.float().contiguous().view(-1),  # `flatten` keeps the stride of a single column
        gate_up_proj.contiguous(),
        down_proj.contiguous(),
    )


def _low_ranks(weight, factors, scalings, num_gate_up, needs=()):
    routing = EveryExpert(len(weight), weight.dtype)
    return low_ranks(routing, (scalings[:num_gate_up], scalings[num_gate_up:]), factors, needs)
