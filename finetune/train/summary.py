"""What a run says of itself when it is over: the numbers of `summary.json`, and the closing table."""

import os
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from modeling_deepseek_moe.distribution import NAME

from ..data.report import row_counts
from ..experts.scores import trained_count
from ..model.chosen_experts import is_specialized
from ..model.gather import count
from ..recipe.schema import Recipe
from .trainer import RunTrainerMixin


def summarize(trainer: RunTrainerMixin, recipe: Recipe, folder: Path, resumed_from: Path | None) -> dict[str, Any]:
    """What a trained run's own state says: what was trained, on what, for how long, with what loss.

    Args:
        trainer: after training.
        recipe: the run's.
        folder: the run's; its `data_report.json` counts the rows.
        resumed_from: the checkpoint that the run went on from, None if it began anew.
    """
    model, state = trainer.model, trainer.state
    return {
        "model": recipe.model,
        "lora": recipe.lora.get("targets", []),
        "trained_experts": trained_count(model.expert_cfg) if is_specialized(model) else None,
        "trainable_parameters": sum(count(p) for p in model.parameters() if p.requires_grad),
        "parameters": sum(count(p) for p in model.parameters()),
        **row_counts(folder),
        "steps": state.global_step,
        "epochs": state.epoch,
        "resumed_from": resumed_from.name if resumed_from else None,
        "train_loss": next((row["loss"] for row in reversed(state.log_history) if "loss" in row), None),
        "seconds_per_step": trainer.step_times.median,
        **machine(),
    }


def machine() -> dict[str, Any]:
    """What the run ran on: `device`, `peak_memory` in bytes (of the GPU, else of the process) and `versions`."""
    threads = torch.get_num_threads()
    if torch.cuda.is_available():
        device, peak = torch.cuda.get_device_name(), torch.cuda.max_memory_allocated()
    else:
        device, peak = f"CPU, {threads} thread{'s' * (threads > 1)}", peak_memory()
    libraries = (NAME, "torch", "transformers", "peft")
    return {"device": device, "peak_memory": peak, "versions": {name: version(name) for name in libraries}}


def peak_memory() -> int:
    """The most memory that this process has had, in bytes."""
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def print_summary(summary: dict[str, Any], folder: Path) -> None:
    """Prints the closing table of a run."""
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
    console = Console()
    console.print(table)
    name = shlex.quote(os.fspath(folder))
    further = {"talk to it": f"chat {name}", "publish it": f"push {name} --to USER/NAME"}
    for what, verb in further.items() if not summary.get("hub") else ():
        console.print(Text(f"{what}: deepseek-moe {verb}"), soft_wrap=True)


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
