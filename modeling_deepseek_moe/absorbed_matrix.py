"""The matrix that `kv_b_proj` multiplies with, whatever kind of layer it is: the absorbed form multiplies it itself.

Plain, LoRA-adapted, in four bits or sharded by rows it is read from the weight. Any other layer shows it by what it
does to the unit vectors. For a quantised layer that is done once, and the matrix kept in the dtype of the activations
until the weight changes or training begins.
"""

import weakref
from typing import NamedTuple

import torch
from torch import nn

from .linear import call_linear, is_plain

# Rows of the input on which a matrix is compared with what the layer itself makes of them, and the largest difference
# relative to that: a layer may round its activations, to FP8 (3 %) or eight bits (1 %).
_ROWS = 16
_BOUND = 2**-4


def matrix_of(layer: nn.Module, inputs: torch.Tensor) -> torch.Tensor | None:
    """The matrix `[out, in]` that `layer` multiplies with; this rank's rows of it under tensor parallelism.

    Active, unmerged LoRA adapters are added, so an adapter acts in the absorbed form as it does in the expanded one.

    Args:
        layer: maps `[..., in]` to `[..., out]`.
        inputs: `[..., in]`, what would be multiplied, in the dtype and on the device of the activations.

    Returns:
        None where `layer` does not multiply all rows with one and the same matrix: it has a bias (PEFT's
        `lora_bias`), adapters chosen by row or by token (`adapter_names`, `alora_offsets`), dropout in training, or
        hooks. None too where multiplying `inputs` is less work than finding the matrix.
    """
    if is_plain(layer):
        return layer.weight if layer.bias is None else None
    if not _is_one_product(layer):
        return None
    if not _is_elsewhere(layer):
        if type(layer) is nn.Linear and (weight := _read(layer)) is not None:
            return weight
        if hasattr(layer, "lora_A") and hasattr(layer, "get_delta_weight") and not _active_variants(layer):
            return _with_lora(layer, inputs)
        if _can_be_kept(layer, inputs):
            return _kept(layer, inputs)
    return _by_unit_vectors(layer, inputs) if inputs.shape[:-1].numel() > inputs.shape[-1] else None


def forget_matrices(layer: nn.Module) -> None:
    """Frees what was kept of `layer` and of the layers in it."""
    for module in layer.modules():
        _matrices.pop(module, None)


def _is_one_product(layer: nn.Module) -> bool:
    if any("Dora" not in type(variant).__name__ for variant in _active_variants(layer)):
        return False  # Arrow chooses by token; PEFT may have others that do
    is_gathered = any(hasattr(weight, "ds_id") for weight in layer.parameters())
    for module in layer.modules():
        drops = isinstance(module, nn.Dropout) and module.training and module.p > 0
        if drops or getattr(module, "bias", None) is not None or _chooses_adapters(module):
            return False
        # ZeRO-3 gathers weights by hooks, accelerate and tensor parallelism by a forward of the module's own.
        if (module._forward_hooks or module._forward_pre_hooks) and not is_gathered:
            return False
        is_placed = hasattr(module, "_hf_hook") or hasattr(getattr(module, "weight", None), "to_local")
        if "forward" in vars(module) and not is_placed:
            return False
    return True


def _chooses_adapters(module: nn.Module) -> bool:
    """PEFT hands such a choice to a layer by a hook that fills in the layer's keyword argument."""
    keywords = (getattr(hook, "keywords", {}) for hook in module._forward_pre_hooks.values())
    return any("adapter_names" in each or "alora_offsets" in each for each in keywords)


def _is_elsewhere(layer: nn.Module) -> bool:
    """Whether a weight comes only for a call: offloaded by accelerate, or a share of ZeRO-3."""
    return any(weight.is_meta or hasattr(weight, "ds_id") for weight in layer.parameters())


def _read(layer: nn.Linear) -> torch.Tensor | None:
    """This rank's rows under tensor parallelism; the values of a weight in this package's four bits."""
    weight = layer.weight
    if hasattr(weight, "to_local"):
        return weight.to_local()
    if hasattr(weight, "packed"):
        return weight.dequantize()
    is_whole = type(weight) in (nn.Parameter, torch.Tensor) and weight.shape == (layer.out_features, layer.in_features)
    return weight if is_whole else None


def _active_variants(layer: nn.Module) -> list:
    """What makes PEFT's active adapters on `layer` other than plain LoRA, DoRA for example."""
    variants = getattr(layer, "lora_variant", {})
    return [variants[name] for name in getattr(layer, "active_adapters", ()) if name in variants]


def _with_lora(layer: nn.Module, inputs: torch.Tensor) -> torch.Tensor | None:
    weight = matrix_of(layer.base_layer, inputs)
    if weight is None or layer.disable_adapters or layer.merged:
        return weight
    deltas = [layer.get_delta_weight(name) for name in layer.active_adapters if name in layer.lora_A]
    return weight + sum(deltas).to(weight.dtype) if deltas else weight


def _by_unit_vectors(layer: nn.Module, inputs: torch.Tensor) -> torch.Tensor | None:
    """None if `layer` does not do to the first of `inputs` what it does to the unit vectors."""
    width = inputs.shape[-1]
    rows = inputs.flatten(0, -2)[:_ROWS]
    # As large as the inputs, for a layer that rounds what it gets on a scale made for them; a power of two is exact.
    scale = rows.detach().abs().amax().float().clamp_min(2**-10).log2().floor().exp2().to(inputs.dtype)
    unit_vectors = torch.eye(width, dtype=inputs.dtype, device=inputs.device) * scale
    if torch.compiler.is_compiling():
        return layer(unit_vectors).T / scale
    images, expected = call_linear(layer, torch.cat((unit_vectors, rows))).tensor_split([width])
    matrix = (images.T / scale).to(inputs.dtype)
    found, expected = (rows @ matrix.T).float(), expected.float()
    return matrix if (found - expected).norm() <= _BOUND * expected.norm() else None


class _Kept(NamedTuple):
    tensors: list[weakref.ref]
    state: tuple
    matrix: torch.Tensor | None


_matrices: weakref.WeakKeyDictionary[nn.Module, _Kept] = weakref.WeakKeyDictionary()


def _can_be_kept(layer: nn.Module, inputs: torch.Tensor) -> bool:
    """Whether nothing but its frozen tensors decides what `layer` does: adapters can be switched, and have modules."""
    if layer.training or torch.compiler.is_compiling() or torch.is_autocast_enabled(inputs.device.type):
        return False
    tensors = _tensors(layer)
    is_fixed = tensors and not any(tensor.requires_grad or tensor.is_inference() for tensor in tensors)
    return bool(is_fixed) and not any(True for _ in layer.children())


def _kept(layer: nn.Module, inputs: torch.Tensor) -> torch.Tensor | None:
    kept = _matrices.get(layer)
    if kept is None or kept.state != _state(layer, inputs) or not _are(kept.tensors, _tensors(layer)):
        # Outside of inference mode, so that a later pass with gradients can use it too.
        with torch.inference_mode(False), torch.no_grad():
            matrix = _by_unit_vectors(layer, inputs)
            matrix = matrix if matrix is None else matrix.contiguous()
        # A first call may have changed how the weight is stored.
        kept = _Kept([weakref.ref(tensor) for tensor in _tensors(layer)], _state(layer, inputs), matrix)
        _matrices[layer] = kept
    return kept.matrix


def _tensors(layer: nn.Module) -> list[torch.Tensor]:
    return [*layer.parameters(), *layer.buffers()]


def _state(layer: nn.Module, inputs: torch.Tensor) -> tuple:
    versions = tuple((tensor._version, tensor.data_ptr()) for tensor in _tensors(layer))
    return inputs.dtype, inputs.device, versions


def _are(references: list[weakref.ref], tensors: list[torch.Tensor]) -> bool:
    return len(references) == len(tensors) and all(
        reference() is tensor for reference, tensor in zip(references, tensors, strict=True)
    )
