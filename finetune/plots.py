"""Pictures of a run."""

from pathlib import Path
from typing import Any

from .run_folder import aside


def loss_curve(history: list[dict[str, Any]], path: Path, eval_loss_before: float | None = None) -> None:
    """Draw training loss, and held-out loss where it was measured, over optimizer steps into a PNG file.

    Args:
        history: the Trainer's `log_history`.
        path: the picture.
        eval_loss_before: held-out loss before the first step.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    train = [(row["step"], row["loss"]) for row in history if "loss" in row]
    held_out = [(row["step"], row["eval_loss"]) for row in history if "eval_loss" in row]
    if eval_loss_before is not None:
        held_out.insert(0, (0, eval_loss_before))
    figure = Figure(figsize=(7, 4))
    FigureCanvasAgg(figure)
    axes = figure.subplots(gridspec_kw={"left": 0.1, "right": 0.97, "bottom": 0.14, "top": 0.96})
    for points, style, label in ((train, "-", "training"), (held_out, "o--", "held out")):
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label)
    axes.set(xlabel="optimizer step", ylabel="loss")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    with aside(path) as picture:
        figure.savefig(picture, format="png", dpi=120)
