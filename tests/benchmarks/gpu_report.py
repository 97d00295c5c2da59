"""The tables of the GPU benchmark: of what was measured, and of what is predicted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from gpu_counts import ASSUMED, DATASHEET, Roofs
from gpu_rows import Row
from report import cells

_MEASURED = ("work", "ours", "other side", "what that is", "ratio", "goal", "result", "TFLOP/s", "GB/s", "predicted")
_PREDICTED = ("work", "operations", "bytes", "at least", "predicted", "most of it", "rates", "other side, at least")


def predictions(rows: Iterable[Row]) -> Iterable[dict[str, Any]]:
    """Of each row: operations, bytes, the least time by the datasheet, all sides' times at the assumed roofs."""
    for row in rows:
        yield {
            "section": row.section,
            "work": row.work,
            "flops": row.ours.flops,
            "bytes": row.ours.bytes,
            "floor": row.ours.seconds(DATASHEET),
            "seconds": row.ours.seconds(ASSUMED),
            "bound": row.ours.bound(ASSUMED),
            "others": {name: work.seconds(ASSUMED) for name, work in row.others.items()},
            "ratios": row.ratios,
            "share": row.share,
        }


def predicted_table(rows: Iterable[Row]) -> str:
    """As Markdown, with the roofs it rests on."""
    lines = [_predicted_cells(prediction) for prediction in predictions(rows)]
    words = (
        "Predictions, not measurements: counted operations and bytes over an H100 SXM's roofs. "
        f"At least: {_roofs(DATASHEET)} (NVIDIA's datasheet). Predicted: {_roofs(ASSUMED)}, assumed of large "
        "products and copies, with the rows that only fill tiles. Starting launches costs time on top of it."
    )
    return f"{words}\n\n{_markdown(_PREDICTED, lines)}"


def measured_table(results: dict[str, Any]) -> str:
    """All sections as Markdown, and what they rest on."""
    facts = ", ".join(f"{name} {value}" for name, value in results["environment"].items())
    parts = ["# GPU benchmark\n", f"{facts}.\n"]
    if roofs := results.get("roofs"):
        parts.append(f"Measured roofs: {_roofs(Roofs(**roofs))}. Rates are of counted operations and bytes.\n")
    if checks := results["checks"]:
        worst = max((check for check in checks if check["holds"]), key=_nearness, default=None)
        kept = sum(check["holds"] for check in checks)
        parts.append(f"Checked before: {kept} of {len(checks)} results agree with float64 references.")
        if worst:
            words = "The one nearest to its bound is {check}: {error:.2g} of the norm (bound {bound:g})."
            parts[-1] += " " + words.format(**worst)
        parts[-1] += "\n"
    predicted = {each["work"]: each for each in results["predictions"]}
    for section, rows in results["sections"].items():
        lines = [_measured_cells(row, predicted.get(row["work"])) for row in rows if "ours" in row]
        parts.append(f"## {section}\n\n{_markdown(_MEASURED, lines)}")
        others = [row for row in rows if "ours" not in row]
        parts += [f"Failed, {row['work']}: {row['error']}\n" for row in others if "error" in row]
        parts += [f"{note}\n" for note in dict.fromkeys(row["note"] for row in others if "note" in row)]
    if results.get("sweep"):
        parts.append(f"## Tiles\n\n{sweep_table(results['sweep'])}")
    if results["left_out"]:
        parts.append("Left out, the minutes being over: " + "; ".join(results["left_out"]) + ".\n")
    return "\n".join(parts)


def sweep_table(rows: Sequence[dict[str, Any]]) -> str:
    """The fastest first of each launcher."""
    order = {work: place for place, work in enumerate(dict.fromkeys(row["work"] for row in rows))}
    lines = [
        (
            row["work"],
            "the launcher's own" if row["tiles"] is None else "x".join(map(str, row["tiles"])),
            row.get("error") or _time(row["seconds"]),
            "" if "error" in row else f"{row['flops_per_second'] / 1e12:.0f}",
            "" if "error" in row else f"{row['bytes_per_second'] / 1e9:.0f}",
        )
        for row in sorted(rows, key=lambda row: (order[row["work"]], row.get("seconds", float("inf"))))
    ]
    return _markdown(("launcher", "tiles", "time", "TFLOP/s", "GB/s"), lines)


def measured_cells(row: dict[str, Any]) -> str:
    """A row on the screen."""
    if "ours" not in row:
        return f"{row['work']}: {row.get('note') or row['error']}"
    return " | ".join(_measured_cells(row, None))


def _measured_cells(row: dict[str, Any], predicted: dict[str, Any] | None) -> tuple[str, ...]:
    shares, goal = row.get("shares", {}), row.get("share_goal")
    rates = []
    for key, unit, roof in (("flops_per_second", 1e12, "product"), ("bytes_per_second", 1e9, "copy")):
        text = f"{row[key] / unit:.0f} ({shares[roof]:.0%})" if key in row else ""
        if goal and goal["of"] == roof:
            text += f", goal {goal['at least']:.0%}: {'reached' if goal['reached'] else 'short'}"
        rates.append(text)
    is_time = row["unit"] == "s"
    return (*cells(row)[:-1], *rates, _time(predicted["seconds"]) if predicted and is_time and rates[0] else "")


def _predicted_cells(prediction: dict[str, Any]) -> tuple[str, ...]:
    others = []
    seconds = prediction["seconds"]
    for name, other in prediction["others"].items():
        kind, goal = prediction["ratios"].get(name, (None, None))
        ratio = seconds / other if kind == "at most" else other / seconds
        words = f"{name} {_time(other)}, {ratio:.2f}x"
        others.append(words if kind is None else f"{words} (goal {kind} {goal}x)")
    rates = f"{prediction['flops'] / seconds / 1e12:.0f} TFLOP/s, {prediction['bytes'] / seconds / 1e9:.0f} GB/s"
    if prediction["share"]:
        roof, goal = prediction["share"]
        share = prediction["flops"] / ASSUMED.flops if roof == "product" else prediction["bytes"] / ASSUMED.bytes
        rates += f", {share / seconds:.0%} of the {roof} (goal {goal:.0%})"
    return (
        prediction["work"],
        f"{prediction['flops'] / 1e12:.3g} T",
        f"{prediction['bytes'] / 1e9:.3g} G",
        _time(prediction["floor"]),
        _time(seconds),
        prediction["bound"],
        rates,
        "; ".join(others),
    )


def _markdown(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [columns, ["---"] * len(columns), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def _roofs(roofs: Roofs) -> str:
    return f"{roofs.flops / 1e12:.3g} TFLOP/s and {roofs.bytes / 1e12:.3g} TB/s"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


def _nearness(check: dict[str, Any]) -> float:
    return check["error"] / check["bound"]
