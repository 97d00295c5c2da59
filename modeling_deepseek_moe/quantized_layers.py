"""What libraries that quantise leave on a model: whether weights are quantised, and what is to be put right there."""

import itertools

import torch
from torch import nn
from transformers.utils import logging

logger = logging.get_logger(__name__)

_INDICES = (torch.int64, torch.bool)


def first_quantized(model: nn.Module) -> str | None:
    """The name of a weight that is no plain tensor of floating-point numbers; None if all are."""
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    names = (name for name, tensor in tensors if is_quantized_tensor(tensor))
    # torch's own quantised layers keep their weights where no parameter shows them.
    packed = (name for name, module in model.named_modules() if type(module).__module__.startswith("torch.ao.nn."))
    return next(itertools.chain(names, packed), None)


def is_quantized_tensor(tensor: torch.Tensor) -> bool:
    """Whether `tensor` holds values packed in integers or eight bits, or stands for such tensors."""
    if hasattr(tensor, "to_local"):
        tensor = tensor.to_local()  # of a DTensor, which itself says nothing of what it holds
    is_packed = tensor.dtype not in _INDICES and (tensor.itemsize == 1 or not tensor.dtype.is_floating_point)
    # Subclasses made of other tensors (torchao, quanto); bitsandbytes may store four bits as bfloat16.
    return is_packed or hasattr(tensor, "__tensor_flatten__") or hasattr(tensor, "quant_state")


def make_config_true(model: nn.Module) -> None:
    """Takes the config's `quantization_config` away where no weight of `model` is quantised (any more).

    Raises:
        ValueError: weights are quantised but the config does not say so: nothing could read what would be saved.
    """
    name, config = first_quantized(model), getattr(model.config, "quantization_config", None)
    if name is not None and config is None:
        raise ValueError(
            f"{name} is quantised, but the config has no quantization_config, without which the saved weights could "
            "not be read: quantise with from_pretrained(..., quantization_config=...), or save before quantising"
        )
    if name is None and config is not None:
        logger.warning(f"{type(model).__name__} is saved without quantization_config: no weight of it is quantised")
        quantizer = getattr(model, "hf_quantizer", None)
        if quantizer is None:
            del model.config.quantization_config
        else:
            quantizer.remove_quantization_config(model)


def keep_bitsandbytes_layout(model: nn.Module) -> None:
    """Keeps four-bit layers of bitsandbytes in the layout of their file format on CPUs with AVX512-BF16.

    bitsandbytes 0.50 would repack them there in the first forward pass in evaluation mode. From then on it gives no
    gradient to what comes before a layer and saves scrambled scales, both in silence, and it refuses widths that are
    no multiple of 32.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
