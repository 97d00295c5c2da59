"""What a run leaves: the trained weights, and the closing table."""

import os
from pathlib import Path
from typing import Any

from peft import PeftModel
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase, Trainer

from .recipe import Recipe
from .run_folder import aside


def save(trainer: Trainer, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, folder: Path) -> dict[str, str | None]:
    """Write `adapter/`, or `model/` of a full fine-tuning; with `merge` both. Each has the tokenizer."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    # Training runs without a cache, and the Trainer says so in the config; whoever loads the result wants one.
    model.config.use_cache = True
    saved: dict[str, str | None] = {"saved_adapter": None, "saved_model": None}
    if isinstance(model, PeftModel):
        with aside(folder / "adapter") as path:
            model.save_pretrained(path)
            tokenizer.save_pretrained(path)
        saved["saved_adapter"] = os.fspath(folder / "adapter")
        if not recipe.merge:
            return saved
        model = model.merge_and_unload()
    with aside(folder / "model") as path:
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    saved["saved_model"] = os.fspath(folder / "model")
    return saved


def print_summary(summary: dict[str, Any], folder: Path) -> None:
    """The closing table."""
    table = Table(title=f"Fine-tuned {summary['model']}", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    share = summary["trainable_parameters"] / summary["parameters"]
    lines = {
        "trained": f"{', '.join(summary['lora']) or 'all weights'}: {summary['trainable_parameters']:,} parameters "
        f"({share:.2%})",
        "rows": f"{summary['train_rows']:,} to train, {summary['eval_rows']:,} held out",
        "steps": f"{summary['steps']:,} ({summary['seconds']:,} s)",
        "training loss": _number(summary["train_loss"]),
        "held-out loss": f"{_number(summary['eval_loss_before'])} before, {_number(summary['eval_loss_after'])} after",
        "adapter": summary["saved_adapter"],
        "model": summary["saved_model"],
        "loss curve": folder / "loss.png",
        "experts": experts if (experts := folder / "experts.png").is_file() else None,
        "Hub": summary.get("hub"),
    }
    for name, value in lines.items():
        if value is not None:
            table.add_row(name, str(value))
    Console().print(table)


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"
