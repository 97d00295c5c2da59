"""`deepseek-moe experts`: which routed experts serve a set of rows, and which of them each of two sets claims.

Every token of a row counts, learned or only read, and no padding; rows with nothing to learn are left out, with a
warning, as in training. E routed experts in a layer, K of them chosen for a token. `experts.json` holds

    model, adapter, dtype, top_k    what ran
    even_share, claim               1/E, and the rule behind `claimed` in words
    data                            of each set its `name` in pictures and tables, `source`, `split`, `rows`, `tokens`
    layers                          of each MoE layer its index `layer` and `loads`, one for each set; with two sets
                                    also their `distance` and `claimed`, two lists of expert ids, busiest first

and a load

    counts              tokens that each expert served
    share               counts / (tokens * K): ESFT's token selection ratio (FACTS 5.1)
    mean_weight         each expert's routing weight, 0 where it was not chosen, mean of all tokens: ESFT's average
                        gate score; tokens weigh alike as in DeepSeek's code, not rows as in the paper (FACTS 5.5)
    load_entropy        1 is even; null if there is one expert only
    max_violation       0 is even
    unused_experts      share of the experts that no token used
    distance_of_halves  distance between a random half of the rows and the rest: what chance alone makes; null for one
                        row

A distance is the total variation distance of two shares: 0 if they are the same, 1 if no expert serves both.
"""

import contextlib
import importlib.util
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel

from modeling_deepseek_moe.balancing import load_entropy, max_violation, unused_share
from modeling_deepseek_moe.distribution import install

from ..data.rows import load_data
from ..errors import UserError
from ..files import check_replaceable, nothing_lost_if_full, read_object, says_full, write_text
from ..model.use import load_for_use
from ..progress import row_progress, speedometer
from ..recipe.load import make_recipe
from ..runs.named import named
from .plots import expert_map
from .routing import CLAIM, RoutingTotals, claimed_experts, moe_layers, padded_batches, routing_totals, share_distance

PICTURE, TABLE = "experts.png", "experts.json"
_BUSIEST, _LISTED = 4, 10


def report_experts(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str],
    compare: str | os.PathLike[str] | None = None,
    output_dir: str | os.PathLike[str] = "experts",
    *,
    adapter: str | os.PathLike[str] | None = None,
    split: str = "train",
    rows: int | None = None,
    max_length: int = 2048,
    batch_size: int = 8,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    text_only: bool = False,
) -> dict[str, Any]:
    """Run data through a model, print which experts serve it, and draw that.

    Args:
        model: local folder or Hub name; of a run's folder the model or the adapter in it (`runs/named.py`).
        data: JSONL file or Hub data set; `data/rows.py` says which rows.
        compare: a second one, to compare with the first.
        output_dir: folder for `experts.png` and `experts.json`, which replace those of an earlier call and no others.
        adapter: folder or Hub name of a LoRA adapter to put on the model.
        split: which split of Hub data sets.
        rows: the most rows of each set, evenly spread over it; None for all.
        max_length: longer rows are cut to this many tokens.
        batch_size: rows in one forward pass.
        dtype: type of the weights in memory: auto (as stored), float32, bfloat16 or float16.
        trust_remote_code: run the tokenizer's code where it is code.
        text_only: of a model of several parts load the text part alone.

    Returns:
        What `experts.json` holds, see the module's docstring.

    Raises:
        UserError: an argument, the model, the adapter or the data cannot be used; one line says why.
        KeyboardInterrupt: stopped from outside; `output_dir` is as it was before.
    """
    for name, value in (("rows", rows), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise UserError(f"`{name}` is {value}: it is a number of rows, at least 1")
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(f"matplotlib, which draws {PICTURE}, is not installed: {install('matplotlib')}")
    sources = [os.fspath(source) for source in (data, compare) if source is not None]
    names = _names(sources)
    folder = Path(output_dir).expanduser()
    settings = {"data_split": split, "max_length": max_length, "dtype": dtype}
    make_recipe({"model": os.fspath(model), "data": sources[0], "output_dir": str(folder), **settings})
    with nothing_lost_if_full(folder), _replaced(folder, (PICTURE, TABLE)) as scratch:
        found = named(model, adapter)
        network, tokenizer = load_for_use(found.model, dtype, found.adapter, trust_remote_code, text_only)
        moe_layers(network)
        sets = {
            name: _spread(load_data(source, split, tokenizer, max_length, scratch / "data"), rows)
            for name, source in zip(names, sources, strict=True)
        }
        try:
            counted = _count(network, sets, batch_size)
        except torch.OutOfMemoryError as error:
            reason = f"batch_size={batch_size} rows of max_length={max_length} tokens do not fit into memory"
            raise UserError(f"{reason}: lower one of them") from error
        report = {
            "model": found.model,
            "adapter": found.adapter,
            "dtype": str(network.dtype).removeprefix("torch."),
            "top_k": network.config.num_experts_per_tok,
            "even_share": 1 / network.config.n_routed_experts,
            "claim": CLAIM,
            "data": [
                {"name": name, "source": source, "split": split, "rows": len(one), "tokens": total.tokens}
                for (name, one), source, (total, _) in zip(sets.items(), sources, counted, strict=True)
            ],
            "layers": [_layer(i, layer, counted) for i, layer in enumerate(moe_layers(network))],
        }
        _draw(names, [total for total, _ in counted], scratch / PICTURE)
        write_text(scratch / TABLE, json.dumps(report, allow_nan=False) + "\n")
    print_report(report, folder)
    return report


def print_report(report: dict[str, Any], folder: Path) -> None:
    """Prints the tables, and where picture and JSON are."""
    console = Console()
    for number in range(len(report["data"])):
        console.print(_load_table(report, number))
    if len(report["data"]) == 2:
        console.print(_comparison_table(report))
    for what, file in (("picture", PICTURE), ("JSON", TABLE)):
        console.print(Text(f"{what}: {folder / file}"), soft_wrap=True)


@contextlib.contextmanager
def _replaced(folder: Path, files: Iterable[str]) -> Iterator[Path]:
    """A scratch folder for `files`; if the block succeeds they replace those in `folder`, else that stays as it is."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output folder {folder} is a file: name another")
    check_replaceable([folder / file for file in files], lambda: _is_report(folder / TABLE))
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=".experts-", dir=folder, ignore_cleanup_errors=True)
    except OSError as error:
        if says_full(error):
            raise
        raise UserError(f"cannot write to output folder {folder}: {error.strerror}") from error
    try:
        with scratch as name:
            yield Path(name)
            for file in files:
                os.replace(Path(name) / file, folder / file)
    except BaseException as error:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(f"stopped: {folder} is as it was before") from None
        raise


def _is_report(path: Path) -> bool:
    """Whether a file is what `report_experts` writes; a run writes another of the same name."""
    report = read_object(path)
    return report is not None and {"claim", "even_share", "layers"} <= report.keys()


def _names(sources: list[str]) -> list[str]:
    """The shortest names that tell the sets apart."""
    names = [Path(source).name for source in sources]
    if len(set(sources)) < len(sources):
        return [names[0], f"{names[0]} (again)"]
    return names if len(set(names)) == len(names) else sources


def _spread(rows: datasets.Dataset, most: int | None) -> datasets.Dataset:
    if most is None or most >= len(rows):
        return rows
    return rows.select([number * len(rows) // most for number in range(most)])


def _count(
    model: PreTrainedModel, sets: dict[str, datasets.Dataset], batch_size: int
) -> list[tuple[RoutingTotals, torch.Tensor]]:
    """Totals of each set, and the shares of two random halves of it `[2, L, E]`; of a single row `[1, L, E]`."""
    found = []
    with row_progress() as progress:
        tasks = [progress.add_task(name, total=len(rows), speed=0.0, start=False) for name, rows in sets.items()]
        for task, rows in zip(tasks, sets.values(), strict=True):
            show = speedometer(progress, task)
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
            halves = (padded_batches(rows.select(half), batch_size, show) for half in order.tensor_split(2))
            one, other = (routing_totals(model, half) for half in halves)
            found.append((one + other, torch.stack([half.shares for half in (one, other) if half.tokens])))
    return found


def _layer(i: int, layer: int, sets: list[tuple[RoutingTotals, torch.Tensor]]) -> dict[str, Any]:
    """The report's entry on one layer, the i-th with experts."""
    entry: dict[str, Any] = {"layer": layer, "loads": []}
    for total, halves in sets:
        counts = total.counts[i]
        entry["loads"].append(
            {
                "counts": counts.tolist(),
                "share": total.shares[i].tolist(),
                "mean_weight": (total.weights[i] / total.tokens).tolist(),
                "load_entropy": _rounded(load_entropy(counts)),
                "max_violation": _rounded(max_violation(counts)),
                "unused_experts": _rounded(unused_share(counts)),
                "distance_of_halves": _rounded(share_distance(*halves[:, i])) if len(halves) == 2 else None,
            }
        )
    if len(sets) == 2:
        (one, ones), (other, others) = ((total.shares[i], halves[:, i]) for total, halves in sets)
        entry["distance"] = _rounded(share_distance(one, other))
        entry["claimed"] = [claimed_experts(ones, others), claimed_experts(others, ones)]
    return entry


def _rounded(value: torch.Tensor) -> float | None:
    return None if value.isnan() else round(value.item(), 6)


def _draw(names: list[str], totals: list[RoutingTotals], path: Path) -> None:
    shares = [total.shares for total in totals]
    maps = {f"{name}: share of the tokens": share for name, share in zip(names, shares, strict=True)}
    differences = {}
    if len(shares) == 2:
        differences[f"{names[0]} (red) minus {names[1]} (blue)"] = shares[0] - shares[1]
    expert_map(maps, totals[0].layers, path, differences)


def _load_table(report: dict[str, Any], number: int) -> Table:
    data, even = report["data"][number], report["even_share"]
    table = Table(
        title=Text(f"{data['name']}: {data['rows']:,} row{'s' * (data['rows'] > 1)}, {data['tokens']:,} tokens"),
        caption=f"busiest experts: id and share of the tokens' choices; even is {even:.2%}",
        caption_justify="left",
    )
    loads = [row["loads"][number] for row in report["layers"]]
    experts = len(loads[0]["counts"])
    for column in ("layer", "load\nentropy", "MaxVio", f"unused\nof {experts}"):
        table.add_column(column, justify="right")
    table.add_column("busiest experts")
    for row, one in zip(report["layers"], loads, strict=True):
        busiest = sorted(enumerate(one["share"]), key=lambda item: -item[1])[:_BUSIEST]
        table.add_row(
            str(row["layer"]),
            _number(one["load_entropy"]),
            _number(one["max_violation"]),
            str(one["counts"].count(0)),
            ", ".join(f"{expert} {share:.1%}" for expert, share in busiest),
        )
    table.add_section()
    means = [_mean([one[name] for one in loads]) for name in ("load_entropy", "max_violation", "unused_experts")]
    table.add_row("mean", *map(_number, means[:2]), f"{experts * means[2]:.1f}")
    return table


def _comparison_table(report: dict[str, Any]) -> Table:
    one, other = (data["name"] for data in report["data"])
    table = Table(
        title=Text(f"{one} against {other}"),
        caption=Text(
            "distance: total variation of the shares, 0 the same, 1 no expert in common\n"
            "of halves: the same between two halves of either set, the larger one; what chance alone makes\n"
            f"claimed: {CLAIM}"
        ),
        caption_justify="left",
    )
    for column in ("layer", "distance", "of halves"):
        table.add_column(column, justify="right")
    for name in (one, other):
        table.add_column(Text(f"claimed by {name}"), overflow="fold")
    all_halves = []
    for row in report["layers"]:
        halves = [one["distance_of_halves"] for one in row["loads"]]
        all_halves.append(None if None in halves else max(halves))
        listed = (_listed(claimed) for claimed in row["claimed"])
        table.add_row(str(row["layer"]), _number(row["distance"]), _number(all_halves[-1]), *listed)
    table.add_section()
    means = (_mean([row["distance"] for row in report["layers"]]), _mean(all_halves))
    table.add_row("mean", *map(_number, means))
    return table


def _listed(experts: list[int]) -> str:
    more = f" and {len(experts) - _LISTED} more" if len(experts) > _LISTED else ""
    return ", ".join(str(expert) for expert in experts[:_LISTED]) + more if experts else "none"


def _mean(values: list[float | None]) -> float | None:
    return None if None in values else sum(values) / len(values)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
