"""What a run leaves: the trained weights."""

import os
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ..files import replaced
from ..model.chosen_experts import is_specialized, release
from ..model.esft_adapter import save_esft_adapter
from ..model.load import trains_adapter
from ..model.lora import save_adapters
from ..recipe.schema import Recipe
from .trainer import RunTrainerMixin


def save(
    trainer: RunTrainerMixin, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, folder: Path
) -> dict[str, str | None]:
    """Write `adapter/`, or `model/` of a full fine-tuning; with `merge` both. Each has the tokenizer."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    # Training runs without a cache, and the Trainer says so in the config; whoever loads the result wants one.
    model.config.use_cache = True
    saved: dict[str, str | None] = {"saved_adapter": None, "saved_model": None}
    if trains_adapter(model):
        with replaced(folder / "adapter") as path:
            if is_specialized(model):
                save_esft_adapter(model, path)
            else:
                save_adapters(model, path, trainer.initial_factors)
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
