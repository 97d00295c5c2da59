"""Pictures of a run."""

from pathlib import Path
from typing import Any

import torch

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


def expert_map(shares: dict[str, torch.Tensor], layers: list[int], path: Path) -> None:
    """Draw how the tokens spread over experts, one heat map under the other, into a PNG file.

    Args:
        shares: title to share of the tokens `[layers, E]`; all maps have one scale. Negative values, of differences,
            make the scale one around 0.
        layers: layer index of every row.
        path: the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, experts = next(iter(shares.values())).shape
    figure = Figure(figsize=(min(16, 3 + experts / 6), len(shares) * (1.2 + min(8, rows / 4))), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, share) in zip(figure.subplots(len(shares), 1, squeeze=False)[:, 0], shares.items(), strict=True):
        # In units of the even share: 1 is balance.
        values = (share * experts).cpu()
        limit = max(values.abs().max().item(), 1e-6)
        is_difference = bool((values < 0).any())
        image = axes.imshow(
            values,
            aspect="auto",
            interpolation="nearest",
            cmap="RdBu_r" if is_difference else "viridis",
            vmin=-limit if is_difference else 0,
            vmax=limit,
        )
        axes.set(title=title, xlabel="expert", ylabel="layer")
        axes.set_yticks(range(rows), [str(layer) for layer in layers])
        axes.xaxis.get_major_locator().set_params(integer=True)
        figure.colorbar(image, ax=axes, label="times the even share")
    with aside(path) as picture:
        figure.savefig(picture, format="png", dpi=120)
