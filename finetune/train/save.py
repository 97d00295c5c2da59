"""What a run leaves: the trained weights."""

import contextlib
import os
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..files import replaced
from ..model.chosen_experts import is_specialized, release
from ..model.esft_adapter import save_esft_adapter
from ..model.gather import gathered, is_cut
from ..model.load import trains_adapter
from ..model.lora import save_adapters
from ..model.shards import save_in_shards
from ..recipe.schema import Recipe
from .trainer import RunTrainerMixin


def save(
    trainer: RunTrainerMixin, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, folder: Path
) -> dict[str, str | None]:
    """Write `adapter/`, or `model/` of a full fine-tuning; with `merge` both. Each has the tokenizer.

    Every process calls it, for each may hold a part of the weights; the main one writes, the others get nothing.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    # Training runs without a cache, and the Trainer says so in the config; whoever loads the result wants one.
    model.config.use_cache = True
    saved: dict[str, str | None] = {"saved_adapter": None, "saved_model": None}
    has_lora = trains_adapter(model) and not is_specialized(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trains_adapter(model) and is_cut(model):
        return saved | save_spread_model(trainer, tokenizer, model, folder / "model")
    weights = gathered(model, trained.__contains__) if has_lora else None
    if not trainer.is_world_process_zero():
        return {}
    if trains_adapter(model):
        with replaced(folder / "adapter") as path:
            if has_lora:
                save_adapters(model, path, trainer.initial_factors, weights)
            else:
                save_esft_adapter(model, path)
            tokenizer.save_pretrained(path)
        saved["saved_adapter"] = os.fspath(folder / "adapter")
        if not recipe.merge:
            return saved
        model = release(model) if is_specialized(model) else model.merge_and_unload()
    with replaced(folder / "model") as path:
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    saved["saved_model"] = os.fspath(folder / "model")
    return saved


def save_spread_model(
    trainer: RunTrainerMixin, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, folder: Path
) -> dict[str, str]:
    """`model/` of weights that lie in parts in all processes, which write it together."""
    with contextlib.ExitStack() as stack:
        path: list[Path | None] = [None]
        if trainer.is_world_process_zero():
            path = [stack.enter_context(replaced(folder))]
        torch.distributed.broadcast_object_list(path)
        save_in_shards(model, path[0])
        if trainer.is_world_process_zero():
            tokenizer.save_pretrained(path[0])
    return {"saved_model": os.fspath(folder)}
