"""Compare ways to keep experts evenly used, each having pretrained the demo's base on the same tokens:

    python model_cards/demo_base/scripts/pretrain.py --output none --balance none
    python model_cards/demo_base/scripts/pretrain.py --output loss --balance loss
    python model_cards/demo_base/scripts/pretrain.py --output bias --balance bias
    python model_cards/demo_base/scripts/compare_balance.py none loss bias --output DIR

writes `balance.png`, `balance_experts.png` and `balance.json` and prints a table in Markdown.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from pretrain import read_recipe

from modeling_deepseek_moe.finetune.experts.plots import expert_map
from modeling_deepseek_moe.finetune.files import replaced, write_text

MEASURES = {
    "eval_loss": "validation loss (nats a token)",
    "max_violation": "MaxVio of a batch",
    "eval_max_violation": "MaxVio of the validation rows",
}


def compare(runs: list[Path], folder: Path) -> str:
    """Draw the runs over each other and put them in a table.

    Args:
        runs: folders that `pretrain.py` has written.
        folder: gets `balance.png` (losses and MaxVio over time), `balance_experts.png` (what each expert served in
            all of training) and `balance.json` (the numbers of the first).

    Returns:
        The table in Markdown: validation loss and both kinds of MaxVio over time, a row for each run.
    """
    logs = [json.loads((run / "training_log.json").read_text(encoding="utf-8")) for run in runs]
    experts = [json.loads((run / "experts.json").read_text(encoding="utf-8")) for run in runs]
    folder.mkdir(parents=True, exist_ok=True)
    tokens = {name_of(log): torch.tensor(seen["tokens"]).float() for log, seen in zip(logs, experts, strict=True)}
    shares = {name: counts / counts.sum(dim=1, keepdim=True) for name, counts in tokens.items()}
    expert_map(shares, experts[0]["layers"], folder / "balance_experts.png")
    series = {
        name_of(log): {
            measure: [(row["step"], row[measure]) for row in log["history"] if measure in row] for measure in MEASURES
        }
        for log in logs
    }
    _draw(series, folder / "balance.png")
    write_text(folder / "balance.json", json.dumps({"seed": logs[0]["seed"], "runs": series}) + "\n")
    steps = [step for step, _ in next(iter(series.values()))["eval_loss"]]
    shown = sorted({steps[0], *(steps[len(steps) * part // 4 - 1] for part in (1, 2, 3, 4) if len(steps) >= part)})
    header = ["| measure | run |", *(f" step {step} |" for step in shown)]
    lines = ["".join(header), "|---|---|" + "---|" * len(shown)]
    for measure, title in MEASURES.items():
        for name, run in series.items():
            cells = "".join(f" {_at(run[measure], step, steps[0]):.3f} |" for step in shown)
            lines.append(f"| {title} | {name} |{cells}")
    return "\n".join(lines)


def name_of(log: dict[str, Any]) -> str:
    """What a run is called in pictures and tables, e.g. `expert loss, alpha 0.01 (V1)`."""
    way = read_recipe()["balances"][log["balance"]]
    alpha, speed = way["aux_loss_alpha"], way["bias_update_speed"]
    if speed:
        return f"bias, gamma {speed}, and sequence loss, alpha {alpha:g} (V3)"
    return f"expert loss, alpha {alpha:g} (V1)" if alpha else "none"


def _at(points: list[tuple[int, float]], step: int, interval: int) -> float:
    """The value at a step; of a batch's MaxVio, a noisy number, the mean of the steps since the last evaluation."""
    last = [value for at, value in points if step - interval < at <= step]
    return sum(last) / len(last)


def _draw(series: dict[str, dict[str, list[tuple[int, float]]]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 9), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (measure, title) in zip(figure.subplots(len(MEASURES), 1, sharex=True), MEASURES.items(), strict=True):
        for name, run in series.items():
            axes.plot(*zip(*run[measure], strict=True), label=name, linewidth=1.2)
        axes.set(ylabel=title)
        axes.grid(alpha=0.3)
        if measure == "eval_loss":
            axes.legend()
            # The first steps would hide the differences of the others.
            values = sorted(value for run in series.values() for _, value in run[measure])
            axes.set_ylim(values[0] * 0.95, values[len(values) * 9 // 10])
        else:
            axes.set_ylim(0, None)
    axes.set(xlabel="optimizer step")
    with replaced(path) as picture:
        figure.savefig(picture, format="png", dpi=110)


def main() -> None:
    """Command line of this script."""
    parser = argparse.ArgumentParser(description="Compare pretraining runs of the demo's base.")
    parser.add_argument("runs", type=Path, nargs="+", help="folders that pretrain.py has written")
    parser.add_argument("--output", type=Path, required=True, help="folder for the picture and its numbers")
    arguments = parser.parse_args()
    print(compare(arguments.runs, arguments.output))


if __name__ == "__main__":
    main()
