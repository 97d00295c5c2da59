"""Training rows to token ids and labels.

A row is a JSON object (of a file, `files.py`, or of a Hub data set) of one of three kinds, or of one that becomes such
(Alpaca's and ShareGPT's, `forms.py`):

    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}]}   learns the assistant's turns
    {"prompt": ..., "completion": ...}                                             learns the completion
    {"text": ...}                                                                  learns everything

`messages` go through the tokenizer's chat template (with the row's `tools`, if any), the other kinds get BOS in front,
and no row has BOS twice. Where learning ends a row, EOS follows, unless the row was cut to `max_length`. The learned
part is tokenized apart from what precedes it, so the model sees the prompt's tokens exactly as when it will generate.
An assistant's message with `mask: 1` (as in ESFT's data) or `weight: 0` is not learned. A thought that the template
leaves out of a transcript (DeepSeek-R1's `<think>`) is learned in the last answer, after the prompt for generation.

Control tokens in what a row says are text, whatever its kind: who writes a text does not thereby end it, or speak in
another's turn. What a template was put into before has them for good; for such rows `split_special_tokens` is false.
`words.py` says which tokens these are.

Content may be a list of text parts, `tools` and arguments of tool calls JSON text (`messages.py`). Tool calls take the
form that the template shows, and what it does not show of tools, calls and thoughts makes a row bad (`templates.py`).

Rows of preferences, for the `dpo` section, are in `preferences.py`.
"""

import contextlib
import dataclasses
import hashlib
import inspect
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
from accelerate import PartialState
from datasets.exceptions import DatasetGenerationError
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..errors import UserError
from ..files import write_text
from ..progress import counting_bar
from ..recipe.schema import Recipe
from .chat import IGNORED, encode, encode_fitting
from .forms import known_form
from .held_out import DOCUMENT, hold_out
from .messages import checked_object
from .packing import pack
from .preferences import encode_preference
from .report import CUT_AWAY, TOO_LONG, RowError, RowReport, save_report
from .sources import open_rows
from .words import words_of

__all__ = ["IGNORED", "RunRows", "encode", "load_data", "recipe_rows"]

_ENCODERS = {"learn": encode_fitting, "prefer": encode_preference}
_COLUMNS = {"learn": ("input_ids", "labels"), "prefer": ("prompt_ids", "chosen_ids", "rejected_ids")}
_FORMAT = 2  # of what the same rows become; counts up where that changes, so that older caches are not taken for it
_SHUFFLED = 1000  # rows of a stream that are shuffled at a time


@dataclasses.dataclass(frozen=True)
class Reading:
    """How rows are read; the fields are those of `Recipe`, and `kind` is "learn" or "prefer"."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    long_rows: str = "cut"
    bad_rows: str = "stop"
    kind: str = "learn"
    split_special_tokens: bool = True

    @property
    def features(self) -> datasets.Features:
        return datasets.Features({name: datasets.List(datasets.Value("int32")) for name in _COLUMNS[self.kind]})

    @property
    def splits(self) -> bool:
        """Whether a row can become several, which are known by their `document`."""
        return self.long_rows == "split"

    @property
    def kept_features(self) -> datasets.Features:
        return datasets.Features({**self.features, **({DOCUMENT: datasets.Value("int64")} if self.splits else {})})

    def digest(self, mark: str) -> str:
        """What tells these rows from all others, as 64 hexadecimal digits."""
        tokenizer = self.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend:
            words = backend.to_str()
        else:  # what a tokenizer in Python does is in its code
            code = inspect.getsource(inspect.getmodule(type(tokenizer)))
            words = json.dumps([tokenizer.get_vocab(), code], sort_keys=True)
        rules = [tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token, self.kind, self.max_length]
        rules += [self.long_rows, self.bad_rows, self.split_special_tokens, _FORMAT, *self.kept_features]
        return hashlib.sha256("\0".join([mark, words, json.dumps(rules)]).encode()).hexdigest()


@dataclasses.dataclass
class RunRows:
    """What a run learns from (`train`), what it measures its loss on (`eval`, or None), and what its Trainer needs."""

    train: datasets.Dataset | datasets.IterableDataset
    eval: datasets.Dataset | None
    callbacks: list[TrainerCallback] = dataclasses.field(default_factory=list)


def load_data(
    source: str,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    cache_dir: str | os.PathLike[str],
    **rules: Any,
) -> datasets.Dataset:
    """Rows of a file, a folder or a Hub data set as `input_ids` and `labels` (-100 where nothing is learned).

    Args:
        source: path of a file or a folder, else the Hub name of a data set.
        split: which split of a folder or a Hub data set.
        tokenizer: needs a chat template where rows have `messages`.
        max_length: longer rows are cut; a row with nothing to learn in what is left is left out, as a table says.
        cache_dir: folder in which the tokenized rows are kept for the next call with the same arguments.
        rules: `long_rows`, `bad_rows` and `split_special_tokens` as in `Recipe`, with the same defaults.

    Raises:
        UserError: no such file or data set, no rows; or a row that ends the reading by these rules, with its line.
    """
    data, report = _load(source, split, Reading(tokenizer, max_length, **rules), cache_dir)
    report.show()
    return hold_out(data, 0, 0, source)[0]


def recipe_rows(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, folder: Path) -> RunRows:
    """A recipe's rows. What was cut or left out is shown, and kept in the folder's `data_report.json`."""
    cache = folder / "data"
    reading = reading_of(recipe, tokenizer)
    reports, held_out = {}, None
    if recipe.eval_data:
        held_out, reports["eval_data"] = _load(recipe.eval_data, recipe.eval_split, reading, cache)
        held_out, _ = hold_out(held_out, 0, recipe.seed, recipe.eval_data)
    if recipe.streaming:
        train, report = _stream(recipe.data, recipe.data_split, reading)
        keep = KeepReport({"data": report, **reports}, folder, eval_rows=len(held_out) if held_out else 0)
        if PartialState().is_main_process:
            keep.write()
        train = train.shuffle(seed=recipe.seed, buffer_size=_SHUFFLED)
        return RunRows(pack(train, recipe.max_length) if recipe.packing else train, held_out, [keep])
    train, report = _load(recipe.data, recipe.data_split, reading, cache)
    share = 0 if recipe.eval_data else recipe.eval_fraction
    train, part = hold_out(train, share, recipe.seed, recipe.data)
    held_out = held_out or part
    rows = len(train)
    train = pack(train, recipe.max_length) if recipe.packing else train
    if PartialState().is_main_process:
        reports = {"data": report, **reports}
        for report in reports.values():
            report.show()
        packed = len(train) if recipe.packing else None
        save_report(reports, folder, train_rows=rows, packed_into=packed, eval_rows=len(held_out) if held_out else 0)
    return RunRows(train, held_out)


def reading_of(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Reading:
    """How a recipe's rows are read."""
    rules = {name: getattr(recipe, name) for name in ("max_length", "long_rows", "bad_rows", "split_special_tokens")}
    return Reading(tokenizer, kind="prefer" if recipe.dpo else "learn", **rules)


class KeepReport(TrainerCallback):
    """Writes the report on streamed rows at each checkpoint, and shows it at the end."""

    def __init__(self, reports: dict[str, RowReport], folder: Path, eval_rows: int):
        self.reports, self.folder, self.eval_rows = reports, folder, eval_rows

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.write()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.write()
            for report in self.reports.values():
                report.show()

    def write(self) -> None:
        save_report(self.reports, self.folder, train_rows=None, packed_into=None, eval_rows=self.eval_rows)


def _load(
    source: str, split: str, reading: Reading, cache_dir: str | os.PathLike[str]
) -> tuple[datasets.Dataset, RowReport]:
    rows, mark = open_rows(source, split)
    name, report = reading.digest(mark)[:32], RowReport(source)
    kept_report = Path(cache_dir) / f"{name}.json"
    arguments = {"reading": reading, "report": report, "kept_report": kept_report}
    try:
        with _counted(rows(), f"tokenizing {Path(source).name}") as counted:
            data = datasets.Dataset.from_generator(
                _cached_rows,
                features=reading.kept_features,
                cache_dir=os.fspath(cache_dir),
                gen_kwargs={"rows": counted, **arguments},
                fingerprint=name,
            )
    except DatasetGenerationError as error:
        raise (error.__cause__ if isinstance(error.__cause__, UserError) else error) from None
    return data, RowReport(**json.loads(kept_report.read_text(encoding="utf-8")))


@contextlib.contextmanager
def _counted(rows: Iterator[tuple[str, Any]], title: str) -> Iterator[Iterator[tuple[str, Any]]]:
    """The rows, with a bar from the first one on in place of that of datasets, which speaks of splits."""
    shows_bars, bar = not datasets.are_progress_bars_disabled(), counting_bar(stays=False)

    def counted() -> Iterator[tuple[str, Any]]:
        bar.start()
        task = bar.add_task(title, total=None)
        for row in rows:
            yield row
            bar.advance(task)

    datasets.disable_progress_bars()
    try:
        yield counted()
    finally:
        bar.stop()
        if shows_bars:
            datasets.enable_progress_bars()


def _cached_rows(
    rows: Iterable[tuple[str, Any]], reading: Reading, report: RowReport, kept_report: Path
) -> Iterator[dict[str, list[int]]]:
    for row in _token_rows(rows, reading, report):
        yield row | {DOCUMENT: report.read} if reading.splits else row
    # Before the data set counts as written: what finds that in the cache finds the report, too.
    write_text(kept_report, json.dumps(dataclasses.asdict(report)))


def _stream(source: str, split: str, reading: Reading) -> tuple[datasets.IterableDataset, RowReport]:
    """Rows that are read over and over while they are asked for, and the report on the first time."""
    rows, _ = open_rows(source, split, streaming=True)
    report = RowReport(source)

    def endless() -> Iterator[dict[str, list[int]]]:
        while True:
            here = RowReport(source)
            for row in _token_rows(rows(), reading, here):
                if not report.complete:
                    report.take(here)
                yield row
            if not report.complete:
                report.take(here)

    return datasets.IterableDataset.from_generator(endless, features=reading.features), report


def _token_rows(
    rows: Iterable[tuple[str, Any]], reading: Reading, report: RowReport
) -> Iterator[dict[str, list[int]]]:
    for where, row in rows:
        yield from encode_row(where, row, reading, report)
    report.complete = True
    if not report.kept:
        report.show()
        raise UserError(f"data {report.source!r} has no rows to learn from (max_length={reading.max_length})")


def encode_row(where: str, row: Any, reading: Reading, report: RowReport) -> list[dict[str, list[int]]]:
    """The rows of token ids that a row becomes, none if it is left out; the report counts it.

    Raises:
        UserError: the row ends the reading.
    """
    report.read += 1
    words = words_of(reading.tokenizer, reading.split_special_tokens)
    as_text = words.rows_as_text
    try:
        if isinstance(row, RowError):
            raise row
        row, kind = known_form(checked_object(row))
        rules = (reading.max_length, reading.long_rows, reading.split_special_tokens)
        encoded, made = _ENCODERS[reading.kind](row, reading.tokenizer, *rules)
    except RowError as error:
        if error.reason == TOO_LONG and reading.long_rows == "stop":
            raise UserError(f"{report.source}, {where}: {error}; `long_rows: cut` or `skip` goes on") from error
        if error.reason not in (TOO_LONG, CUT_AWAY) and reading.bad_rows == "stop":
            raise UserError(f"{report.source}, {where}: {error} (`bad_rows: skip` goes on without)") from error
        report.leave_out(where, error)
        return []
    report.kept += 1
    report.kinds[kind] = report.kinds.get(kind, 0) + 1
    report.control_tokens += words.rows_as_text > as_text
    report.cut += made == "cut"
    report.split += made == "split"
    for part in encoded:
        answers = [part[name] for name in ("labels", "chosen_ids", "rejected_ids") if name in part]
        report.tokens += sum(len(ids) for name, ids in part.items() if name != "labels")
        report.learned_tokens += sum(label != IGNORED for ids in answers for label in ids)
    return encoded
