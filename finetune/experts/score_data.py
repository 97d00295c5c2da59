"""`deepseek-moe esft score` and `esft select`, and the scoring at the start of a run."""

import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel

from modeling_deepseek_moe.conversion.adapters.esft import read_expert_cfg

from ..data.packing import PACKED
from ..data.rows import load_data
from ..errors import UserError
from ..files import check_replaceable, nothing_lost_if_full, write_text
from ..model.counting import blocks_of, router_of
from ..model.use import load_for_use
from ..progress import row_progress, speedometer
from ..recipe.load import RUN_RECIPE
from ..recipe.schema import PAPERS_TOP_P
from ..runs.named import named
from .routing import moe_layers, padded_batches, routing_totals
from .scores import Scores, esft_scores, expert_cfg, read_scores, select_experts, trained_count

_LISTED = 12


def score_data(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    split: str = "train",
    sample_tokens: int = 131_072,
    max_length: int = 4096,
    batch_size: int = 8,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    text_only: bool = False,
    device_map: str | None = None,
) -> Scores:
    """Run a sample of the data through the model, and write the score of every expert.

    Args:
        model: local folder or Hub name; of a run's folder the model or the adapter in it (`runs/named.py`).
        data: JSONL file or Hub data set; `data/rows.py` says which rows.
        output: the file of scores; one that an earlier call wrote is replaced.
        split: which split of Hub data sets.
        sample_tokens: random rows are taken until they have so many tokens.
        max_length: longer rows are cut to this many tokens.
        batch_size: rows in one forward pass.
        dtype: type of the weights in memory: auto (as stored), float32, bfloat16 or float16.
        trust_remote_code: run the tokenizer's code where it is code.
        text_only: of a model of several parts load the text part alone.
        device_map: where its parts go, as `device_map` of `from_pretrained`; None for one device (`model/use.py`).

    Returns:
        What the file holds, see `scores.py`.

    Raises:
        UserError: an argument, the model or the data cannot be used; one line says why.
        KeyboardInterrupt: stopped from outside; `output` is as it was before.
    """
    output = _writable(output, read_scores)
    for name, value, least in (("sample_tokens", sample_tokens, 1), ("batch_size", batch_size, 1)):
        if value < least:
            raise UserError(f"`{name}` is {value}: it has to be at least {least}")
    if max_length < 2:
        raise UserError(f"`max_length` is {max_length}: a row needs at least 2 tokens to learn from")
    try:
        found = named(model)
        network, tokenizer = load_for_use(found.model, dtype, found.adapter, trust_remote_code, text_only, device_map)
        moe_layers(network)
        with nothing_lost_if_full(output):
            # The folder of tokenized rows is gone before the scores are written, which need little room.
            scratch = tempfile.TemporaryDirectory(prefix=".scores-", dir=output.parent, ignore_cleanup_errors=True)
            with scratch as cache:
                rows = load_data(os.fspath(data), split, tokenizer, max_length, cache)
                scores = score_rows(network, rows, sample_tokens, batch_size)
                del rows
            write_text(output, json.dumps(scores) + "\n")
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped: {output} is as it was before") from None
    print_scores(scores)
    Console().print(Text(f"scores: {output}"), soft_wrap=True)
    return scores


def select_from(
    scores: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    score: Literal["token", "gate"] = "token",
    top_p: float | None = None,
    shared_experts: bool = False,
    non_expert_modules: bool = False,
) -> dict[str, Any]:
    """Choose the experts to train by a file of scores, and write `expert_cfg.json`.

    Args:
        scores: a file that `score_data` wrote, or a published one.
        output: the `expert_cfg.json` to write; one that an earlier call wrote is replaced.
        score: token or gate.
        top_p: what the scores of the chosen ones have to sum up to in a layer; None for the paper's, 0.2 for token
            and 0.1 for gate.
        shared_experts, non_expert_modules: train these as well.

    Returns:
        What the file holds.

    Raises:
        UserError: an argument or the file of scores cannot be used; one line says why.
    """
    if score not in PAPERS_TOP_P:
        raise UserError(f"`score` is {score!r}: choose one of {', '.join(PAPERS_TOP_P)}")
    found, output = read_scores(scores), _writable(output, read_expert_cfg)
    top_p = PAPERS_TOP_P[score] if top_p is None else top_p
    choice = expert_cfg(found, score, top_p, shared_experts, non_expert_modules)
    with nothing_lost_if_full(output):
        write_text(output, json.dumps(choice) + "\n")
    print_choice(choice, found[f"{score}_scores"], f"{score} scores sum up to {top_p}")
    Console().print(Text(f"experts: {output}"), soft_wrap=True)
    return choice


def score_rows(
    model: PreTrainedModel, rows: Iterable[Mapping[str, Any]], sample_tokens: int, batch_size: int
) -> Scores:
    """The scores of a model's experts on a random sample of rows with `input_ids`, with a progress bar.

    Raises:
        UserError: the model has no routed experts, or memory is not enough for the batches.
    """
    sample, was_training = sample_of(rows, sample_tokens), model.training
    model.eval()
    try:
        with row_progress() as progress:
            task = progress.add_task("scoring experts", total=len(sample), speed=0.0, start=False)
            totals = routing_totals(model, padded_batches(sample, batch_size, speedometer(progress, task)))
    except torch.OutOfMemoryError as error:
        raise UserError(f"batch_size={batch_size} rows do not fit into memory: lower it, or `max_length`") from error
    finally:
        model.train(was_training)
    router = router_of(next(iter(blocks_of(model).values())))
    # What the router makes of weights that sum up to one is all that it multiplies them by.
    even = torch.full((1, router.top_k), 1 / router.top_k)
    return esft_scores(totals, gate_scale=router.weigh(even).sum().item())


def sample_of(rows: Iterable[Mapping[str, Any]], tokens: int) -> datasets.Dataset:
    """Random rows, the same for the same data, until they have so many tokens; the first ones of a stream."""
    taken, count = [], 0
    if isinstance(rows, datasets.Dataset):
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
        rows = map(rows.__getitem__, order)
    for row in rows:
        taken += [{"input_ids": ids} for ids in _unpacked(row)]
        count += len(row["input_ids"])
        if count >= tokens:
            break
    return datasets.Dataset.from_list(taken)


def _unpacked(row: Mapping[str, Any]) -> list[list[int]]:
    ids, positions = row["input_ids"], row.get(PACKED)
    starts = [0] if positions is None else [place for place, position in enumerate(positions) if position == 0]
    return [ids[start:stop] for start, stop in itertools.pairwise([*starts, len(ids)])]


def print_scores(scores: Scores) -> None:
    """Prints for each layer how many experts the paper's shares need, and the best ones."""
    table = Table(
        title="Experts of the task",
        caption="needed: experts whose scores sum up to that; best: id and token score",
        caption_justify="left",
    )
    table.add_column("layer", justify="right")
    for score, top_p in PAPERS_TOP_P.items():
        table.add_column(f"needed for\n{score} {top_p}", justify="right")
    table.add_column("best")
    chosen = [_counts(scores, score, top_p) for score, top_p in PAPERS_TOP_P.items()]
    for layer, of_expert in scores["token_scores"].items():
        best = sorted(of_expert.items(), key=lambda item: -item[1])[:4]
        listed = ", ".join(f"{expert} {share:.1%}" for expert, share in best)
        table.add_row(layer, *(counts.get(layer, "-") for counts in chosen), listed)
    Console().print(table)


def print_choice(choice: Mapping[str, Any], scores: Mapping[str, Mapping[str, float]], rule: str) -> None:
    """Prints the chosen experts of each layer."""
    table = Table(title=f"{trained_count(choice)} experts whose {rule} in each layer")
    for column in ("layer", "experts", "score"):
        table.add_column(column, justify="right")
    table.add_column("the best first", overflow="fold")
    for layer, experts in choice["experts"].items():
        total = sum(scores[layer][str(expert)] for expert in experts)
        more = f" and {len(experts) - _LISTED} more" if len(experts) > _LISTED else ""
        listed = ", ".join(map(str, experts[:_LISTED])) + more
        table.add_row(layer, f"{len(experts)} of {len(scores[layer])}", f"{total:.3f}", listed)
    Console().print(table)


def _counts(scores: Scores, score: Literal["token", "gate"], top_p: float) -> dict[str, str]:
    try:
        return {layer: str(len(experts)) for layer, experts in select_experts(scores, score, top_p).items()}
    except UserError:  # a gate that gives its experts less weight than that
        return {}


def _writable(output: str | os.PathLike[str], read: Callable[[Path], Any]) -> Path:
    """The path of a file that can be written: there is none, or one of its own kind, which `read` reads."""
    path = Path(output).expanduser()
    if path.is_dir():
        raise UserError(f"output {path} is a folder: name a file")
    if not os.access(path.parent, os.W_OK):
        reason = "cannot be written to" if path.parent.is_dir() else "is no folder"
        raise UserError(f"output {path}: {path.parent} {reason}")
    check_replaceable([path], lambda: not _belongs_to_weights(path.parent) and _can(read, path))
    return path


def _belongs_to_weights(folder: Path) -> bool:
    """Whether a file in this folder is a part of a run, an adapter or a model."""
    return (folder / RUN_RECIPE).is_file() or any(folder.glob("*.safetensors"))


def _can(read: Callable[[Path], Any], path: Path) -> bool:
    try:
        read(path)
    except UserError:
        return False
    return True
