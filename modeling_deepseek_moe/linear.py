"""Calls of linear layers: half precision on CPU, above all a few rows, as decoding multiplies, at the speed of memory.

The layers are exactly `nn.Linear`, the type that quantisers look for; what is fast is how they are called.
"""

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from .cpu_rules import WEIGHT_FIRST, holds
from .half_products import LinearThroughFloat32, goes_through_float32, product_dtype

# A product of more rows computes long enough to hide how its weight is read.
_FEW_ROWS = 16


def call_linear(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`layer(x)`, `[..., in]` -> `[..., out]`.

    Products in half precision go through float32 where `cpu_rules` says so, those inside of adapters and of other
    layers too. Elsewhere a few rows times a plain layer are multiplied by `few_rows_linear` where that is faster.
    Whatever does more than one product is called as it is: adapters, quantised, sharded or offloaded layers, hooks.
    """
    if type(x) is torch.Tensor and goes_through_float32(x, product_dtype(x)):
        with LinearThroughFloat32():
            return layer(x)
    if x.device.type != "cpu" or x.dtype != torch.bfloat16 or not 0 < x.numel() <= _FEW_ROWS * x.shape[-1]:
        return layer(x)
    is_traced = type(x) is not torch.Tensor or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu")
    if is_traced or not holds(WEIGHT_FIRST, x.dtype) or not is_plain(layer):
        return layer(x)
    if layer.bias is not None or layer.weight.dtype != x.dtype:
        return layer(x)
    return few_rows_linear(x.reshape(-1, x.shape[-1]), layer.weight).view(*x.shape[:-1], -1)


def few_rows_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x W'`, `[n, out]`, reading the weight as it lies in memory: `(W x')'` is the same sum and packs `x'`."""
    if len(x) == 1:
        return torch.mv(weight, x[0])[None]
    return (weight @ x.mT).mT.contiguous()


def is_plain(layer: nn.Module) -> bool:
    """Whether calling `layer` is one product with a weight that is all here, plus its bias, and nothing else."""
    if type(layer) is not nn.Linear or "forward" in vars(layer) or layer._compiled_call_impl is not None:
        return False
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return False
    weight = layer.weight
    # FSDP and DeepSpeed leave a flat or empty tensor in the place of a weight that is elsewhere.
    is_whole = type(weight) in (nn.Parameter, torch.Tensor) and weight.shape == (layer.out_features, layer.in_features)
    return is_whole and not _has_any_global_hook()
