"""Which rows of a data set were used, and which were not, with the reason and the line."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ..errors import UserError
from ..files import write_text

REPORT = "data_report.json"
TOO_LONG, CUT_AWAY = "longer than max_length", "nothing to learn is left after the cut"
_SHOWN = 5
_OURS = ("messages", "prompt and completion", "text", "preferences")
_AS_TEXT = (
    "with control tokens in the text, read as text\n[dim]`split_special_tokens: false` makes them what they are called"
    "[/dim]"
)


class RowError(UserError):
    """A row that cannot be learned from; `reason` says why in a few words, the same for every row of its kind."""

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason


@dataclass
class RowReport:
    """What became of the rows of one source.

    Attributes:
        source: file or Hub name.
        read, kept: rows; a row that was split counts once.
        cut, split: rows longer than the context, of those kept.
        tokens, learned_tokens: how many are in the rows kept, after the cut.
        kinds: what the rows kept were -> how many of them (`forms.py`).
        control_tokens: rows kept in whose text control tokens stand, which were read as text.
        left_out: reason -> number of `rows`, where the `first` of them are, and the `message` of the first.
        complete: whether the source was read to its end.
    """

    source: str
    read: int = 0
    kept: int = 0
    cut: int = 0
    split: int = 0
    tokens: int = 0
    learned_tokens: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    control_tokens: int = 0
    left_out: dict[str, dict[str, Any]] = field(default_factory=dict)
    complete: bool = False

    def leave_out(self, where: str, error: RowError) -> None:
        """Counts a row that is not used."""
        entry = self.left_out.setdefault(error.reason, {"rows": 0, "first": [], "message": str(error)})
        entry["rows"] += 1
        if len(entry["first"]) < _SHOWN:
            entry["first"].append(where)

    def take(self, other: RowReport) -> None:
        """Becomes equal to another report."""
        for item in dataclasses.fields(self):
            setattr(self, item.name, getattr(other, item.name))

    def show(self) -> None:
        """Prints what the rows were read as, if not one kind of ours, and a table of what was not used as it is."""
        if len(self.kinds) > 1 or any(kind not in _OURS for kind in self.kinds):
            counts = sorted(self.kinds.items(), key=lambda item: -item[1])
            read_as = ", ".join(f"{count:,} {kind}" for kind, count in counts) if len(counts) > 1 else counts[0][0]
            Console().print(Text(f"Rows of {self.source}: read as {read_as}"), soft_wrap=True)
        if not (self.cut or self.split or self.control_tokens or self.left_out):
            return
        table = Table(
            title=escape(f"Rows of {self.source}: {self.kept:,} of {self.read:,} used"), title_justify="left"
        )
        for name in ("rows", "what", "which"):
            table.add_column(name, justify="right" if name == "rows" else "left", overflow="fold")
        for count, what in (
            (self.cut, "cut to max_length"),
            (self.split, "split at max_length"),
            (self.control_tokens, _AS_TEXT),
        ):
            if count:
                table.add_row(f"{count:,}", what, "")
        for reason, entry in sorted(self.left_out.items(), key=lambda item: -item[1]["rows"]):
            more = ", ..." if entry["rows"] > len(entry["first"]) else ""
            first = ", ".join(entry["first"]) + more
            what = f"left out: {reason}\n[dim]{escape(entry['message'])}[/dim]"
            table.add_row(f"{entry['rows']:,}", what, escape(first))
        Console().print(table)


def save_report(reports: dict[str, RowReport], folder: Path, **numbers: int | None) -> None:
    """Write the run folder's `data_report.json`: a report for each of `data` and `eval_data`, and other numbers."""
    report = {key: dataclasses.asdict(report) for key, report in reports.items()}
    write_text(folder / REPORT, json.dumps(report | numbers, indent=2, ensure_ascii=False) + "\n")


def row_counts(folder: Path) -> dict[str, int | None]:
    """`train_rows` (None if streamed), `eval_rows`, and how many sequences the rows were `packed_into`, or None."""
    report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    return {key: report[key] for key in ("train_rows", "packed_into", "eval_rows")}
