"""The benchmark's rows as a table on the screen, a Markdown table and a picture."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

COLUMNS = ("work", "ours", "other side", "what that is", "ratio", "goal", "result", "runs")


def rows_of(results: dict[str, Any]) -> Iterable[tuple[str, dict[str, Any]]]:
    """All rows with the name of their section."""
    for section, found in results["sections"].items():
        for row in found["rows"]:
            yield section, row


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row's text under each of `COLUMNS`: medians, and quartiles where there are several runs."""
    runs = {row["ours"]["n"], row["other"]["n"]}
    return (
        row["work"],
        _spread(row["ours"], row["unit"]),
        _spread(row["other"], row["unit"]),
        row["other"]["label"]
        if row["ours"]["label"] == "ours"
        else f"{row['other']['label']} (ours: {row['ours']['label']})",
        _ratio(row["ratio"], row["unit"]),
        _goal(row["goal"]),
        {None: "", True: "reached", False: "short"}[row["reached"]],
        " / ".join(str(n) for n in (sorted(runs) if len(runs) == 1 else (row["ours"]["n"], row["other"]["n"]))),
    )


def table(results: dict[str, Any]) -> Table:
    """For the screen."""
    found = Table(*COLUMNS, show_lines=False)
    last = None
    for section, row in rows_of(results):
        if last not in (None, section):
            found.add_section()
        last = section
        style = {None: None, True: "green", False: "red"}[row["reached"]]
        texts = [Text(text) for text in cells(row)]
        texts[COLUMNS.index("result")].stylize(style or "")
        found.add_row(*texts)
    return found


def markdown(results: dict[str, Any]) -> str:
    """For the results folder: a table a section, and below it where that section ran."""
    parts = ["# Benchmark\n", "Median (quartiles). A ratio is the median of those of neighbouring runs.\n"]
    for section, found in results["sections"].items():
        lines = [" | ".join(COLUMNS), " | ".join("---" for _ in COLUMNS)]
        lines += [" | ".join(cells(row)) for row in found["rows"]]
        parts.append(f"## {section}\n\n" + "\n".join(f"| {line} |" for line in lines) + "\n")
        if agreement := _worst_agreement(found["rows"]):
            parts.append(agreement + "\n")
        parts.append(_facts(found["environment"]) + "\n")
    return "\n".join(parts)


def picture(results: dict[str, Any], path: Path) -> bool:
    """Draws time over context length, of a decode step and of one layer's attention; False without such rows."""
    rows = [row for section, row in rows_of(results) if section == "decode" and "context" in row]
    if not rows:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for part, style, name in (("step", "-", "step"), ("attention", "--", "attention of one layer")):
        points = sorted((row["context"], row) for row in rows if row["part"] == part)
        contexts = [context for context, _ in points]
        for side, colour, who in (("ours", "tab:blue", "ours"), ("other", "tab:red", "transformers")):
            spread = [[1e3 * value for value in row[side]["quartiles"]] for _, row in points]
            if not spread:
                continue
            medians, lower, upper = zip(*spread, strict=True)
            axes.plot(contexts, medians, style, color=colour, marker="o", markersize=4)
            axes.fill_between(contexts, lower, upper, color=colour, alpha=0.15, linewidth=0)
            axes.annotate(
                f"{who}, {name}",
                (contexts[-1], medians[-1]),
                xytext=(8, 0),
                textcoords="offset points",
                va="center",
                color=colour,
            )
    contexts = sorted({row["context"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
    axes.set_xlim(contexts[0] / 1.2, contexts[-1] * 1.2 * (contexts[-1] / contexts[0]) ** 0.45)
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("milliseconds a token")
    axes.set_title(_title(results["sections"]["decode"]["environment"]), fontsize=10)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    return True


def write(results: dict[str, Any], folder: Path, console: Console) -> None:
    """The table on the screen; `benchmark.md` and `decode.png` in the folder."""
    console.print(table(results))
    (folder / "benchmark.md").write_text(markdown(results), encoding="utf-8")
    picture(results, folder / "decode.png")


def _spread(side: dict[str, Any], unit: str) -> str:
    median, lower, upper = side["quartiles"]
    scale, name = _scale(median, unit)
    text = f"{_number(median / scale)} {name}"
    return text if side["n"] == 1 else f"{text} ({_number(lower / scale)} to {_number(upper / scale)})"


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _scale(value: float, unit: str) -> tuple[float, str]:
    if unit == "bytes":
        return (1e9, "GB") if value >= 1e9 else (1e6, "MB")
    return (1.0, "s") if value >= 1 else (1e-3, "ms")


def _ratio(ratio: dict[str, Any], unit: str) -> str:
    median, lower, upper = ratio["quartiles"]
    if ratio["of"] == "ours / other":
        words = ("as long", "as much")
    else:
        words = ("faster", "smaller") if median >= 1 else ("as fast", "as small")
    text = f"{median:.2f}x {words[unit == 'bytes']}"
    return text if ratio["n"] == 1 else f"{text} ({lower:.2f} to {upper:.2f})"


def _goal(goal: dict[str, float] | None) -> str:
    if goal is None:
        return ""
    ((kind, value),) = goal.items()
    if kind == "below by":
        scale, name = _scale(value, "bytes")
        return f"below by {value / scale:.3g} {name}"
    return f"{kind} {value:g}x"


def _worst_agreement(rows: list[dict[str, Any]]) -> str:
    """How far both sides' outputs are apart, in the row that comes nearest to its bound."""
    agreements = [row["agreement"] for row in rows if row.get("agreement", {}).get("bound")]
    if not agreements:
        return ""
    worst = max(agreements, key=lambda each: each["difference"] / each["bound"])
    difference, bound = worst["difference"], worst["bound"]
    return f"Both sides' outputs differ by at most {difference:.2g} of the largest entry (bound {bound})."


def _facts(environment: dict[str, Any]) -> str:
    facts = {name: value for name, value in environment.items() if name != "roofs"}
    for name, value in environment["roofs"].items():
        what, unit = name.split(", ")
        facts[what] = f"{_number(value / 1e9)} G{unit}"
    return ", ".join(f"{name} {value}" for name, value in facts.items()) + "."


def _title(environment: dict[str, Any]) -> str:
    layers, threads = environment["layers"], environment["threads"]
    return (
        f"Decoding one token, sizes of {environment['size']}, {layers} layers, bfloat16\n"
        f"{environment['device']}, {threads} threads, torch {environment['torch']}, "
        f"transformers {environment['transformers']}"
    )
