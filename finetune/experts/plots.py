"""Pictures of a run."""

from pathlib import Path
from typing import Any

import torch

from ..files import replaced


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
    with replaced(path) as picture:
        figure.savefig(picture, format="png", dpi=120)


def expert_map(
    shares: dict[str, torch.Tensor],
    layers: list[int],
    path: Path,
    differences: dict[str, torch.Tensor] | None = None,
) -> None:
    """Draw how the tokens spread over experts, one heat map under the other, into a PNG file.

    Everything is in units of the even share 1/E. Experts without any token are grey.

    Args:
        shares: title to share of the tokens `[layers, E]`; these maps have one scale.
        layers: layer index of every row.
        path: the picture.
        differences: title to one share minus another `[layers, E]`, drawn below on a scale of its own around 0; it
            reaches to 0.2 even shares at least, so that chance stays pale.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import Normalize, PowerNorm
    from matplotlib.figure import Figure

    differences = differences or {}
    rows, experts = next(iter(shares.values())).shape
    # In inches; a map has room around it for its labels.
    height, width = min(7.5, max(1.5, rows / 5)), min(14.4, max(5.4, 1 + experts / 8))
    whole = (width + 1.6, (len(shares) + len(differences)) * (height + 0.9))
    figure = Figure(figsize=whole)
    FigureCanvasAgg(figure)
    tops = iter(whole[1] - 0.35 - number * (height + 0.9) for number in range(len(shares) + len(differences)))

    def draw(title: str, values: torch.Tensor, norm: Normalize, colors: Any, label: str) -> None:
        bottom = next(tops) - height
        axes, bar = (
            figure.add_axes((left / whole[0], bottom / whole[1], size / whole[0], height / whole[1]))
            for left, size in ((0.6, width), (width + 0.7, 0.15))
        )
        image = axes.imshow(values.numpy(), aspect="auto", interpolation="nearest", cmap=colors, norm=norm)
        axes.set_title(title, loc="left", parse_math=False)
        axes.set(xlabel="expert", ylabel="layer")
        step = -(-rows // 20)
        axes.set_yticks(range(0, rows, step), [str(layer) for layer in layers[::step]])
        axes.set_xticks(range(0, experts, -(-experts // 32)))
        figure.colorbar(image, cax=bar).set_label(label, size="small")

    # A square root keeps small shares apart where one expert has many times the even one.
    common = PowerNorm(0.5, 0, max(2, *(share.max().item() * experts for share in shares.values())))
    for title, share in shares.items():
        unused = share == 0
        draw(
            f"{title} (grey: unused)" if unused.any() else title,
            (share.double() * experts).masked_fill(unused, float("nan")).cpu(),
            common,
            colormaps["viridis"].with_extremes(bad="0.8"),
            "times the even share",
        )
    limit = max(0.2, *(share.abs().max().item() * experts for share in differences.values()), 0)
    for title, difference in differences.items():
        values = difference.double().cpu() * experts
        draw(title, values, Normalize(-limit, limit), colormaps["RdBu_r"], "difference, in even shares")
    with replaced(path) as picture:
        figure.savefig(picture, format="png", dpi=120)
