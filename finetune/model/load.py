"""The model that a recipe names, with the part of it that is to be trained."""

import itertools
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modeling_deepseek_moe import DeepseekMoeConfig, DeepseekMoeForCausalLM

from ..errors import RecipeError, UserError, first_line, raised_by
from ..files import says_full
from ..recipe.schema import Recipe
from .checks import check_configs, check_finite
from .chosen_experts import is_specialized
from .lora import known_warnings, lora_config
from .quantization import quantization_options
from .spread import spread_options
from .tokenizer import check_tokenizer, load_tokenizer


def load(recipe: Recipe, **placing: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The recipe's model and its tokenizer, from a local folder or the Hub.

    Args:
        recipe: that names it.
        **placing: of `from_pretrained`: `device_map`, `offload_folder`. Weights on disk are not looked through.

    Raises:
        UserError: there is no such model, it cannot be loaded as the recipe says, or its tokenizer is another model's.
    """
    choices = {
        "attn_implementation": recipe.attn_implementation,
        "experts_implementation": recipe.experts_implementation,
    }
    is_here = Path(recipe.model).is_dir()
    if is_here:
        check_configs(recipe.model)
    tokenizer = load_tokenizer(recipe.model, recipe.trust_remote_code)
    if not is_here:  # a Hub that is not reached is waited for once
        check_configs(recipe.model)
    try:
        options = spread_options(recipe, DeepseekMoeConfig.from_pretrained(recipe.model)) if recipe.parallel else {}
        model = DeepseekMoeForCausalLM.from_pretrained(
            recipe.model,
            dtype=recipe.dtype,
            text_only=recipe.text_only,
            **{key: value for key, value in choices.items() if value},
            **quantization_options(recipe),
            **options,
            **recipe.losses,
            **placing,
        )
    except (torch.OutOfMemoryError, torch.AcceleratorError, RecipeError):
        raise
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        if says_full(error):
            raise
        raise UserError(f"cannot load model {recipe.model!r}: {first_line(error)}") from error
    check_tokenizer(tokenizer, model.config.vocab_size, recipe.model)
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    check_finite(tensors, f"model {recipe.model!r}")
    return model, tokenizer


def trains_adapter(model: nn.Module) -> bool:
    """Whether only a part of the model is trained, which is saved apart from it: LoRA, or ESFT's experts."""
    return isinstance(model, PeftModel) or is_specialized(model)


def add_adapters(model: PreTrainedModel, recipe: Recipe) -> PreTrainedModel | PeftModel:
    """The model with LoRA on the recipe's targets; unchanged if it names none."""
    if not recipe.lora:
        return model
    config = adapter_config(model, recipe)
    try:
        with known_warnings():
            return get_peft_model(model, config)
    except ValueError as error:
        if not raised_by(error, "peft"):
            raise
        raise RecipeError(f"`lora.*`: {first_line(error)}") from error


def adapter_config(model: PreTrainedModel, recipe: Recipe) -> LoraConfig:
    """What the recipe's `lora` keys ask for.

    Raises:
        RecipeError: they name what the model has not, or what cannot be adapted so.
    """
    try:
        return lora_config(model, **recipe.lora)
    except ValueError as error:
        raise RecipeError(f"`lora.*`: {first_line(error)}") from error
