"""The recipe key `quantization`: the frozen weights under LoRA in four bits."""

from typing import TYPE_CHECKING, Any

from .._compat import ignore_in_ddp

if TYPE_CHECKING:
    from torch import nn

    from ..recipe.schema import Recipe


def quantization_options(recipe: "Recipe") -> dict[str, Any]:
    """Arguments of `from_pretrained` by which the frozen weights come in four bits; none for a recipe without the key.

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
    """Tells DistributedDataParallel to leave weights in four bits alone.

    It would read them as plain numbers to compare and send them; every rank has read the same checkpoint anyway.
    """
    from modeling_deepseek_moe.quantized.weights import NF4Weight

    ignore_in_ddp(model, (name for name, weight in model.named_parameters() if isinstance(weight, NF4Weight)))
