"""Pictures of a run."""

import itertools
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..files import replaced

_FEW = 30  # points of a curve that are marked


def loss_curve(history: list[dict[str, Any]], path: Path, eval_loss_before: float | None = None) -> None:
    """Draw training loss, and held-out loss where it was measured, over optimizer steps into a PNG file.

    A second scale on top says how many tokens had been seen by then, where the history counts them.

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
    axes = figure.subplots()
    # A line between a few points hides where they are, and there is none for a single one.
    for points, style, label in (
        (train, "-" if len(train) > _FEW else ".-", "training"),
        (held_out, "o--", "held out"),
    ):
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label)
    axes.set(xlabel="optimizer step", ylabel="loss")
    axes.xaxis.get_major_locator().set_params(integer=True)
    seen = {row["step"]: row["num_input_tokens_seen"] for row in history if row.get("num_input_tokens_seen")}
    if seen:
        _add_tokens(axes, {0: 0, **seen})
    axes.grid(alpha=0.3)
    axes.legend()
    _write(figure, path)


def _add_tokens(axes: Any, seen: dict[int, int]) -> None:
    """A scale of tokens above one of steps; the tokens of two steps may be unlike."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    steps = sorted(seen)
    tokens = [seen[step] for step in steps]
    shown = [value for value in MaxNLocator(6).tick_values(0, tokens[-1]) if 0 <= value <= tokens[-1]]
    name = EngFormatter(sep="")
    top = axes.secondary_xaxis("top")
    top.set_xticks(np.interp(shown, tokens, steps), [name(value) for value in shown])
    top.set_xlabel("tokens seen")


def _write(figure: Any, path: Path) -> None:
    with replaced(path) as picture:
        # As large as titles and labels need it.
        figure.savefig(picture, format="png", dpi=120, bbox_inches="tight", pad_inches=0.12)


def expert_map(
    shares: dict[str, torch.Tensor],
    layers: list[int],
    path: Path,
    differences: dict[str, torch.Tensor] | None = None,
) -> None:
    """Draw how the tokens spread over experts, one heat map under the other, into a PNG file.

    Everything is in units of the even share 1/E. Experts without any token are grey; a layer that did not run, as
    multi-token layers without a loss, has no row, and the first title says so.

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

    ran = torch.stack([share.cpu().sum(dim=1) > 0 for share in shares.values()]).any(dim=0)
    ran = ran if ran.any() else ~ran
    idle = [str(layer) for layer, has_run in zip(layers, ran, strict=True) if not has_run]
    layers = [layer for layer, has_run in zip(layers, ran, strict=True) if has_run]
    shares = {title: share[ran.to(share.device)] for title, share in shares.items()}
    differences = {title: values[ran.to(values.device)] for title, values in (differences or {}).items()}
    rows, experts = next(iter(shares.values())).shape
    # In inches; a map has room around it for its labels.
    height, width = min(7.5, max(1.5, rows / 5)), min(14.4, max(5.4, 1 + experts / 8))
    said = f"layer{'s' * (len(idle) > 1)} {', '.join(idle)} did not run" if idle else ""
    wrapped = {}
    for title, share in {**shares, **dict.fromkeys(differences)}.items():
        notes = "; ".join(["grey: unused"] * bool(share is not None and (share == 0).any()) + [said] * bool(said))
        wrapped[title] = textwrap.wrap(f"{title} ({notes})" if notes else title, int(width * 12))
        said = ""
    rooms = [height + 0.7 + 0.2 * len(lines) for lines in wrapped.values()]
    whole = (width + 1.6, sum(rooms))
    figure = Figure(figsize=whole)
    FigureCanvasAgg(figure)
    bottoms = iter(whole[1] - total + 0.55 for total in itertools.accumulate(rooms))

    def draw(title: str, values: torch.Tensor, norm: Normalize, colors: Any, label: str) -> None:
        bottom = next(bottoms)
        axes, bar = (
            figure.add_axes((left / whole[0], bottom / whole[1], size / whole[0], height / whole[1]))
            for left, size in ((0.6, width), (width + 0.7, 0.15))
        )
        image = axes.imshow(values.numpy(), aspect="auto", interpolation="nearest", cmap=colors, norm=norm)
        axes.set_title("\n".join(wrapped[title]), loc="left", parse_math=False)
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
            title,
            (share.double() * experts).masked_fill(unused, float("nan")).cpu(),
            common,
            colormaps["viridis"].with_extremes(bad="0.8"),
            "times the even share",
        )
    limit = max(0.2, *(share.abs().max().item() * experts for share in differences.values()), 0)
    for title, difference in differences.items():
        values = difference.double().cpu() * experts
        draw(title, values, Normalize(-limit, limit), colormaps["RdBu_r"], "difference, in even shares")
    _write(figure, path)
