"""Four-bit weights made while a checkpoint is read: no more than one layer's experts are in memory as they were."""

from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .._compat import Quantizer, with_operations
from .weights import BITS, NF4Weight, is_quantized, load_bitsandbytes, quantize

_METHOD = "deepseek_moe_nf4"


@register_quantization_config(_METHOD)
class NF4Config(QuantizationConfigMixin):
    """`from_pretrained(name, quantization_config=NF4Config())`: see `quantized_weights`."""

    def __init__(self, quant_method: str = _METHOD):
        self.quant_method = quant_method


@register_quantizer(_METHOD)
class NF4Quantizer(Quantizer):
    """What transformers asks about a model of four-bit weights while it loads, trains and saves it.

    Raises:
        ImportError: bitsandbytes is not installed.
    """

    is_trainable = True
    quantized_element_size = BITS / 8

    def validate_environment(self, *args, **kwargs):
        load_bitsandbytes()

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs) -> bool:
        return is_quantized(param_name)

    def is_serializable(self) -> bool:
        return False

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize()

    def update_weight_conversions(self, weight_conversions: list, *_: nn.Module) -> list:
        """Experts go into four bits one by one instead of being stacked before. From 5.21 on the model comes along."""
        return [
            with_operations(rule, [_QuantizeExperts()])
            if isinstance(rule, WeightConverter) and is_quantized(f".{rule.target_patterns[0]}")
            else rule
            for rule in weight_conversions
        ]

    def mark(self, model: nn.Module) -> None:
        """Says of `model` what transformers and accelerate look at."""
        model.is_quantized, model.quantization_method = True, self.quantization_config.quant_method
        self.postprocess_model(model)

    def before_loading(self, model: nn.Module) -> None:
        model.set_experts_implementation("sorted_mm")


def quantize_weights(model: nn.Module) -> nn.Module:
    """Puts the routed experts and the linear layers of attention and MLPs of `model` into four bits, in place.

    Embedding, head, norms, routers and what joins the inputs of multi-token prediction stay as they are. The experts'
    products are those of `experts_implementation="sorted_mm"` from then on. No more than one weight is there twice.

    Args:
        model: a transformers model whose routed experts are `experts.gate_up_proj` and `experts.down_proj`.

    Returns:
        `model`.

    Raises:
        ImportError: bitsandbytes is not installed.
    """
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if is_quantized(f"{name}.{key}"):
                setattr(module, key, nn.Parameter(quantize(parameter), requires_grad=False))
    model.set_experts_implementation("sorted_mm")
    model.hf_quantizer = NF4Quantizer(NF4Config(), pre_quantized=False)
    model.hf_quantizer.mark(model)
    return model


class _QuantizeExperts(ConversionOps):
    """The experts' own matrices `{pattern: [E tensors]}` to one stack; those of several patterns joined by rows."""

    def convert(self, input_dict: dict[str, list], source_patterns, target_patterns, **kwargs) -> dict[str, Any]:
        lists = [input_dict.pop(pattern) for pattern in source_patterns]
        parts = []
        for expert in range(len(lists[0])):
            parts.append(quantize(torch.cat([tensors[expert] for tensors in lists])))
            for tensors in lists:
                tensors[expert] = None
        packed, magnitudes = (torch.stack([getattr(each, key) for each in parts]) for key in ("packed", "magnitudes"))
        stack = NF4Weight(packed, magnitudes, torch.Size((len(parts), *parts[0].shape)), parts[0].dtype)
        return {target_patterns[0]: stack}


class _Quantize(ConversionOps):
    def convert(self, input_dict: dict[str, Any], **kwargs) -> dict[str, nn.Parameter]:
        result = {}
        for name, value in input_dict.items():
            value = value[0] if isinstance(value, list) else value
            weight = value if isinstance(value, NF4Weight) else quantize(value)
            result[name] = nn.Parameter(weight, requires_grad=False)
        return result
