"""The recipe key `quantization`: the frozen weights under LoRA in four bits."""

from typing import TYPE_CHECKING, Any

from .._compat import ignore_in_ddp
from ..recipe.values import RecipeError

if TYPE_CHECKING:
    from torch import nn

    from ..recipe.load import Recipe


def check_quantization(recipe: "Recipe") -> None:
    """Raise a RecipeError for keys that do not go with weights in four bits, which are frozen and not saved."""
    if recipe.quantization is None:
        return
    name = f"`quantization` is {recipe.quantization}"
    if not recipe.lora or recipe.esft:
        way_out = "leave the `esft` keys out" if recipe.lora else "set `lora.targets`, or leave `quantization` out"
        raise RecipeError(f"{name}, whose weights are frozen and carry LoRA: {way_out}")
    if recipe.merge:
        raise RecipeError(
            f"{name}, into which adapters are not merged: set merge: false, and merge the adapter into the model "
            f"itself afterwards with `deepseek-moe convert {recipe.model} TARGET --to bf16 --adapter ADAPTER`"
        )
    if recipe.bias_update_speed:
        raise RecipeError(
            f"{name}, of which only the adapter is saved, but `bias_update_speed` moves the routers' bias: set it to 0"
        )
    if recipe.experts_implementation not in (None, "sorted_mm"):
        raise RecipeError(
            f"{name}, which multiplies expert by expert, but `experts_implementation` is "
            f"{recipe.experts_implementation!r}: leave it out"
        )


def quantization_options(recipe: "Recipe") -> dict[str, Any]:
    """What `from_pretrained` is to be told.

    Raises:
        ValueError: the checkpoint is quantised already.
    """
    if recipe.quantization is None:
        return {}
    import torch

    from modeling_deepseek_moe import DeepseekMoeConfig
    from modeling_deepseek_moe.quantized.loading import NF4Config

    if theirs := getattr(DeepseekMoeConfig.from_pretrained(recipe.model), "quantization_config", None):
        raise ValueError(
            f"its weights are quantised already ({theirs.get('quant_method')}): for `quantization: "
            f"{recipe.quantization}` convert them first with `deepseek-moe convert {recipe.model} TARGET --to bf16`"
        )
    # Where the training runs, so that the weights as they were never are in the machine's memory all at once.
    on_gpu = torch.cuda.is_available() and not recipe.training.get("use_cpu")
    return {"quantization_config": NF4Config()} | ({"device_map": {"": torch.cuda.current_device()}} if on_gpu else {})


def leave_out_of_ddp(model: "nn.Module") -> None:
    """Keep the weights in four bits from DistributedDataParallel, which would read them as plain numbers to compare
    and send them. Every rank has read the same checkpoint."""
    from modeling_deepseek_moe.quantized.weights import NF4Weight

    ignore_in_ddp(model, (name for name, weight in model.named_parameters() if isinstance(weight, NF4Weight)))
