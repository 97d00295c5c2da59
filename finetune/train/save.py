"""What a run leaves: the trained weights, and the closing table."""

import os
import resource
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from ..model.chosen_experts import is_specialized, release
from ..model.esft_adapter import save_esft_adapter
from ..model.load import trains_adapter
from ..model.lora import save_adapters
from ..recipe.load import Recipe
from ..runs.folder import aside
from .trainer import Finishes


def save(trainer: Finishes, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, folder: Path) -> dict[str, str | None]:
    """Write `adapter/`, or `model/` of a full fine-tuning; with `merge` both. Each has the tokenizer."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    # Training runs without a cache, and the Trainer says so in the config; whoever loads the result wants one.
    model.config.use_cache = True
    saved: dict[str, str | None] = {"saved_adapter": None, "saved_model": None}
    if trains_adapter(model):
        with aside(folder / "adapter") as path:
            if is_specialized(model):
                save_esft_adapter(model, path)
            else:
                save_adapters(model, path, trainer.initial_factors)
            tokenizer.save_pretrained(path)
        saved["saved_adapter"] = os.fspath(folder / "adapter")
        if not recipe.merge:
            return saved
        model = release(model) if is_specialized(model) else model.merge_and_unload()
    with aside(folder / "model") as path:
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    saved["saved_model"] = os.fspath(folder / "model")
    return saved


def machine() -> dict[str, Any]:
    """What the run ran on: `device`, `peak_memory` in bytes (of the GPU, else of the process) and `versions`."""
    if torch.cuda.is_available():
        device, peak = torch.cuda.get_device_name(), torch.cuda.max_memory_allocated()
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        device = f"CPU, {torch.get_num_threads()} threads"
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    libraries = ("deepseek-moe", "torch", "transformers", "peft")
    return {"device": device, "peak_memory": peak, "versions": {name: version(name) for name in libraries}}


def print_summary(summary: dict[str, Any], folder: Path) -> None:
    """The closing table."""
    table = Table(title=f"Fine-tuned {summary['model']}", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    share = summary["trainable_parameters"] / summary["parameters"]
    lines = {
        "trained": f"{_trained(summary)}: {summary['trainable_parameters']:,} parameters ({share:.2%})",
        "rows": _rows(summary),
        "steps": f"{summary['steps']:,} ({summary['seconds']:,} s{_each(summary['seconds_per_step'])})",
        "peak memory": f"{summary['peak_memory'] / 1e9:.2f} GB, {summary['device']}",
        "training loss": _number(summary["train_loss"]),
        "held-out loss": f"{_number(summary['eval_loss_before'])} before, {_number(summary['eval_loss_after'])} after",
        "preferred rightly": _preference(summary),
        **_scores(summary),
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


def _trained(summary: dict[str, Any]) -> str:
    if (experts := summary["trained_experts"]) is not None:
        return f"{experts:,} routed experts"
    return ", ".join(summary["lora"]) or "all weights"


def _preference(summary: dict[str, Any]) -> str | None:
    if summary.get("preference_accuracy") is None:
        return None
    return f"{summary['preference_accuracy']:.1%}, by a margin of {summary['preference_margin']:.3f}"


def _scores(summary: dict[str, Any]) -> dict[str, str]:
    before, after = summary["metric_before"] or {}, summary["metric_after"] or {}
    return {name: f"{_number(before.get(name))} before, {_number(after[name])} after" for name in after}


def _rows(summary: dict[str, Any]) -> str:
    rows, packed = summary["train_rows"], summary["packed_into"]
    train = "streamed" if rows is None else f"{rows:,}"
    packed = "" if packed is None else f", packed into {packed:,} sequences"
    return f"{train} to train{packed}, {summary['eval_rows']:,} held out"


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"


def _each(seconds: float | None) -> str:
    return "" if seconds is None else f", {seconds:.3g} s each"
