"""`deepseek-moe preview`: rows as a model will see them, and what of them it learns."""

import dataclasses
import itertools
import re
from collections.abc import Iterator
from statistics import median

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from ..recipe.schema import Recipe
from .chat import IGNORED
from .report import RowReport
from .rows import encode_row, reading_of
from .sources import open_rows
from .words import words_of

_HEAD, _TAIL = 400, 200  # characters of a long passage that are shown
# What would steer a terminal, move its lines or turn its writing around.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_ANSWERS = {"chosen_ids": "chosen", "rejected_ids": "rejected"}


def preview_rows(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, rows: int = 3, limit: int | None = 1000, full: bool = False
) -> RowReport:
    """Prints the first rows of a recipe's data with what is learned of them, and what becomes of all of them.

    Args:
        recipe: its `data`, `data_split`, and the keys that say how rows are read.
        rows: how many are shown.
        limit: the most rows that are read for the counts; None for all.
        full: show the middle of long passages, too.

    Returns:
        The counts. Bad rows are among them, whatever the recipe's `bad_rows` says.

    Raises:
        UserError: no such data, or no row of it can be learned from.
    """
    console = Console(highlight=False, soft_wrap=True)
    plain = console.color_system is None or console.no_color
    reading = dataclasses.replace(reading_of(recipe, tokenizer), bad_rows="skip")
    if reading.long_rows == "stop":
        reading = dataclasses.replace(reading, long_rows="skip")
    report, lengths, shown = RowReport(recipe.data), [], 0
    source = open_rows(recipe.data, recipe.data_split, streaming=True)[0]()
    for where, row in itertools.islice(source, limit):
        kinds, cut = dict(report.kinds), report.cut
        for part in encode_row(where, row, reading, report):
            ids = sum(len(ids) for name, ids in part.items() if name != "labels")
            lengths.append(ids)
            if shown < rows:
                shown += 1
                kind = next(kind for kind, count in report.kinds.items() if count != kinds.get(kind, 0))
                console.print(_title(where, kind, part, report.cut > cut))
                for passage in _passages(part, tokenizer, recipe, plain, full):
                    console.print(passage)
                console.print()
    report.complete = limit is None or report.read < limit
    if not report.read:
        raise UserError(f"data {recipe.data!r} has no rows")
    console.print(_legend(plain))
    console.print(_counts(report, lengths, recipe.max_length))
    report.show()
    if report.left_out and recipe.bad_rows == "stop":
        console.print(Text("a run stops at a row that cannot be read: `bad_rows: skip` goes on without such rows"))
    if not report.kept:
        raise UserError(f"data {recipe.data!r} has no rows to learn from (max_length={recipe.max_length})")
    return report


def _title(where: str, kind: str, part: dict[str, list[int]], is_cut: bool) -> Text:
    tokens = sum(len(ids) for name, ids in part.items() if name != "labels")
    answers = sum(len(part.get(name, [])) for name in _ANSWERS)
    learned = sum(label != IGNORED for label in part.get("labels", [])) or answers
    cut = ", cut to max_length" if is_cut else ""
    return Text(f"{where}: {kind}, {tokens:,} tokens, {learned:,} of them learned{cut}", style="bold")


def _legend(plain: bool) -> Text:
    if plain:
        return Text("[[learned]], read, {control token}")
    return Text.assemble(
        ("learned", _style(True, False)),
        ", ",
        ("read", _style(False, False)),
        ", ",
        ("control token", _style(True, True)),
    )


def _counts(report: RowReport, lengths: list[int], max_length: int) -> Text:
    which = "all" if report.complete else "the first"
    counts = f"{which} {report.read:,} rows: {report.kept:,} used, {report.tokens:,} tokens, "
    counts += f"{report.learned_tokens:,} of them learned"
    if lengths:
        counts += f"; {min(lengths):,} to {max(lengths):,} tokens a row, median {median(lengths):,.0f}"
    return Text(f"{counts}, max_length {max_length:,}")


def _passages(
    part: dict[str, list[int]], tokenizer: PreTrainedTokenizerBase, recipe: Recipe, plain: bool, full: bool
) -> Iterator[Text]:
    if "labels" in part:
        learned = [label != IGNORED for label in part["labels"]]
        yield _passage(part["input_ids"], learned, tokenizer, recipe, plain, full)
        return
    yield _passage(part["prompt_ids"], [False] * len(part["prompt_ids"]), tokenizer, recipe, plain, full)
    for name, title in _ANSWERS.items():
        shown = _passage(part[name], [True] * len(part[name]), tokenizer, recipe, plain, full)
        yield Text(f"{title}: ").append_text(shown)


def _passage(
    ids: list[int],
    learned: list[bool],
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    plain: bool,
    full: bool,
) -> Text:
    """The text of token ids, marked by what is learned and what is a control token: by colours, or by brackets."""
    control = words_of(tokenizer, recipe.split_special_tokens).control_ids
    passage, was_learned, end, before = Text(), False, 0, ""

    def text_of(tokens: list[int]) -> str:
        return tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    for (is_learned, control_id), run in itertools.groupby(
        zip(learned, ids, strict=True), key=lambda pair: (pair[0], pair[1] if pair[1] in control else None)
    ):
        start, end = end, end + len(list(run))
        # With what precedes it: some tokenizers leave out the space that a text begins with.
        text = text_of(ids[:end])
        piece, before = text[len(before) :] if text.startswith(before) else text_of(ids[start:end]), text
        piece = _UNPRINTABLE.sub(lambda found: repr(found[0])[1:-1], piece)
        if len(piece) > _HEAD + _TAIL + 100 and not full:
            left_out = len(piece) - _HEAD - _TAIL
            piece = f"{piece[:_HEAD]} ... {left_out:,} characters (--full) ... {piece[-_TAIL:]}"
        if plain:
            passage.append("]]" if was_learned and not is_learned else "")
            passage.append("[[" if is_learned and not was_learned else "")
            name = piece.strip()
            passage.append(piece if control_id is None else piece.replace(name, f"{{{name}}}", 1))
        else:
            passage.append(piece, _style(is_learned, control_id is not None))
        was_learned = is_learned
    return passage.append("]]" if plain and was_learned else "")


def _style(is_learned: bool, is_control: bool) -> str:
    return f"{'green' if is_learned else 'bright_black'}{' reverse' if is_control else ''}"
