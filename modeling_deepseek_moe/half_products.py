"""Products of matrices in half precision on CPUs without instructions for it: through float32, tile by tile.

Of the larger operand one tile at a time is made float32, never all of it; sums are float32 and rounded once. On every
other machine, and in every other dtype, these are torch's own products.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from .cpu_rules import A_ROW_AS_IT_IS, HALF, THROUGH_FLOAT32, holds
from .large_tensors import empty

# Numbers of a tile, of an operand or of the result: 2 MiB in float32. Half and twice of it take the same time, and the
# whole a third more (24 rows, 2816 x 2048, AMD EPYC with AVX2).
_TILE = 2**19
_FEW_ROWS = 3
_PLAIN = (torch.Tensor, nn.Parameter)
_F_LINEAR = F.linear


def product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None, adds: bool = False) -> torch.Tensor:
    """`a @ b`, `[n, k] x [k, m]` -> `[n, m]`, with gradients of any order.

    Args:
        out: where the product is written, without gradients.
        adds: whether it is added to `out` instead.
    """
    if not _is_tiled(a, b):
        return out.addmm_(a, b) if adds else torch.mm(a, b, out=out)
    if out is None and torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        return _Product.apply(a, b)
    return _in_tiles(a, b, out, adds)


def linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear`, autocast included."""
    tensors = (input, weight) if bias is None else (input, weight, bias)
    dtype, dtypes = product_dtype(input), {tensor.dtype for tensor in tensors}
    is_known = all(type(tensor) in _PLAIN for tensor in tensors) and dtypes <= {torch.float32, *HALF}
    is_cast = torch.is_autocast_enabled(input.device.type)
    fits = weight.ndim == 2 and input.shape[-1:] == weight.shape[1:] and (is_cast or len(dtypes) == 1)
    if not (is_known and fits and goes_through_float32(input, dtype)):
        return _F_LINEAR(input, weight, bias)
    y = product(input.reshape(-1, input.shape[-1]).to(dtype), weight.to(dtype).mT)
    y = y.view(*input.shape[:-1], len(weight))
    return y if bias is None else y + bias.to(dtype)


def product_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype of a linear layer's product with `tensor` here and now; autocast leaves float64 alone."""
    device = tensor.device.type
    if torch.is_autocast_enabled(device) and tensor.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return tensor.dtype


def goes_through_float32(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether products of `tensor`, in its dtype or another, are taken in float32."""
    is_here = tensor.device.type == "cpu" and not torch.compiler.is_compiling()
    return is_here and holds(THROUGH_FLOAT32, dtype or tensor.dtype)


def wide_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype to multiply small stacks of matrices in; the result is rounded to that of `tensor`."""
    return torch.float32 if goes_through_float32(tensor) else tensor.dtype


class LinearThroughFloat32(TorchFunctionMode):
    """Inside it every `F.linear` is `linear`: what a layer calls, whatever it is made of, PEFT's adapters for one."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return (linear if function is _F_LINEAR else function)(*args, **(kwargs or {}))


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(a, b):
        return _in_tiles(a, b)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        a, b = ctx.saved_tensors
        da = product(gradient, b.mT) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return da, None
        # Stored as b is: that of a linear layer is its weight transposed.
        is_transposed = b.stride(0) == 1
        return da, product(gradient.mT, a).mT if is_transposed else product(a.mT, gradient)


def _is_tiled(a: torch.Tensor, b: torch.Tensor) -> bool:
    # What does not fit together is torch's to refuse.
    return a.dtype == b.dtype and a.shape[1] == b.shape[0] and a.device == b.device and goes_through_float32(a)


def _in_tiles(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None, adds: bool = False) -> torch.Tensor:
    if torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):  # which would round the tiles again
            return _in_tiles(a, b, out, adds)
    (n, k), m = a.shape, b.shape[1]
    if a.numel() > b.numel():
        # So that b is the larger one. A new result is laid out as [n, m] all the same.
        out = empty(torch.Size((n, m)), a.dtype, a.device) if out is None and m > _FEW_ROWS else out
        return _in_tiles(b.mT, a.mT, None if out is None else out.mT, adds).mT
    is_transposed = b.stride(0) == 1 and b.stride(1) >= k
    if out is None and n <= _FEW_ROWS and is_transposed and holds(A_ROW_AS_IT_IS, a.dtype):
        return torch.mm(a, b)
    out = empty(torch.Size((n, m)), a.dtype, a.device) if out is None else out
    write = torch.Tensor.add_ if adds else torch.Tensor.copy_
    a, by_columns = a.float(), out.stride(0) == 1  # sums are stored as the result is
    if n < k and not is_transposed:
        # The rows of b lie together, and the result is smaller than b: sums over tiles of rows.
        sums = a.new_zeros(m, n).mT if by_columns else a.new_zeros(n, m)
        step = max(1, _TILE // max(1, m))
        for start in range(0, k, step):
            rows = slice(start, start + step)
            sums.addmm_(a[:, rows], b[rows].float())
        write(out, sums)
        return out
    step = max(1, _TILE // max(1, k, n))
    for start in range(0, m, step):
        columns = slice(start, start + step)
        tile = b[:, columns].float()
        write(out[:, columns], (tile.mT @ a.mT).mT if by_columns else a @ tile)
    return out
