"""Training rows to token ids and labels.

A row is a JSON object (a line of a JSONL file, or a row of a Hub data set) of one of three kinds:

    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}]}   learns the assistant's turns
    {"prompt": ..., "completion": ...}                                             learns the completion
    {"text": ...}                                                                  learns everything

`messages` go through the tokenizer's chat template (with the row's `tools`, if any), the other kinds get BOS in front,
and no row has BOS twice. Where learning ends a row, EOS follows, unless the row was cut to `max_length`. The learned
part is tokenized apart from what precedes it, so the model sees the prompt's tokens exactly as when it will generate.
"""

import copy
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetGenerationError
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from .recipe import Recipe
from .recipe_values import RecipeError
from .run_folder import file_digest

IGNORED = -100
_MARK = "\ue000"  # of Unicode's private use area: in no text
_FEATURES = datasets.Features(
    {"input_ids": datasets.List(datasets.Value("int32")), "labels": datasets.List(datasets.Value("int32"))}
)
_logger = logging.getLogger(__name__)


def load_data(
    source: str, split: str, tokenizer: PreTrainedTokenizerBase, max_length: int, cache_dir: str | os.PathLike[str]
) -> datasets.Dataset:
    """Rows of a JSONL file or of a Hub data set as `input_ids` and `labels` (-100 where nothing is learned).

    Args:
        source: path of a JSONL file, else the Hub name of a data set.
        split: of the Hub data set.
        tokenizer: needs a chat template where rows have `messages`.
        max_length: longer rows are cut; a row with nothing to learn in what is left is dropped, with a warning.
        cache_dir: where the tokenized rows are kept, for the next call with the same arguments.

    Raises:
        RecipeError: no such file or data set, a row that is not JSON or of no known kind (with its line), no rows.
    """
    path = Path(source)
    if path.is_file():
        rows, mark = _jsonl_rows(path), file_digest(path)
    elif path.exists() or path.suffix in (".jsonl", ".json") or source.startswith((".", "/", "~")):
        reason = "is a folder, not a JSONL file" if path.is_dir() else "does not exist"
        raise RecipeError(f"data {source!r} {reason}: give the path of a JSONL file or the Hub name of a data set")
    else:
        rows, mark = _hub_rows(source, split)
    dropped: list[str] = []
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    template = json.dumps([tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token])
    name = hashlib.sha256("\0".join([mark, words, template, str(max_length)]).encode()).hexdigest()
    try:
        data = datasets.Dataset.from_generator(
            _token_rows,
            features=_FEATURES,
            cache_dir=os.fspath(cache_dir),
            gen_kwargs={
                "rows": rows,
                "source": source,
                "tokenizer": tokenizer,
                "max_length": max_length,
                "dropped": dropped,
            },
            fingerprint=name[:32],
        )
    except DatasetGenerationError as error:
        raise (error.__cause__ if isinstance(error.__cause__, RecipeError) else error) from None
    if dropped:
        _logger.warning(
            "%d rows of %s dropped: max_length=%d leaves nothing to learn (the first: %s)",
            *(len(dropped), source, max_length, dropped[0]),
        )
    return data


def recipe_rows(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Rows to train on and rows to measure on, or None for the latter."""
    cache = folder / "data"
    train = load_data(recipe.data, recipe.data_split, tokenizer, recipe.max_length, cache)
    if recipe.eval_data:
        return train, load_data(recipe.eval_data, recipe.eval_split, tokenizer, recipe.max_length, cache)
    held_out = max(1, round(len(train) * recipe.eval_fraction)) if recipe.eval_fraction else 0
    if held_out == 0 or len(train) < 2:
        return train, None
    parts = train.train_test_split(test_size=held_out, seed=recipe.seed)
    return parts["train"], parts["test"]


def collator(tokenizer: PreTrainedTokenizerBase, pad_to_multiple_of: int | None = None) -> DataCollatorForSeq2Seq:
    """Pads `input_ids` on the right and `labels` with -100; EOS stands in for a missing padding token."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=pad_to_multiple_of, label_pad_token_id=IGNORED)


def encode(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[list[int], list[int]]:
    """Token ids and labels of one row, at most `max_length` of each.

    Raises:
        RecipeError: the row is of no known kind, or the chat template refuses it.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids, labels, last = [], [], None
    for text, learned in _pieces(row, tokenizer):
        piece = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids += piece
        labels += piece if learned else [IGNORED] * len(piece)
        last = (learned, piece) if piece else last
    if bos is not None and (ids[:1] == [bos] or row.get("messages") is None):
        start = next((i for i, token in enumerate(ids) if token != bos), len(ids))
        ids, labels = [bos, *ids[start:]], [IGNORED, *labels[start:]]
    if eos is not None and last and last[0] and eos not in last[1]:
        ids, labels = [*ids, eos], [*labels, eos]
    return ids[:max_length], labels[:max_length]


def _token_rows(
    rows: Iterable[tuple[str, Any]],
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    dropped: list[str],
) -> Iterator[dict[str, list[int]]]:
    kept = 0
    for where, row in rows:
        try:
            ids, labels = encode(row, tokenizer, max_length)
        except RecipeError as error:
            raise RecipeError(f"{where}: {error}") from error
        if any(label != IGNORED for label in labels[1:]):
            kept += 1
            yield {"input_ids": ids, "labels": labels}
        else:
            dropped.append(where)
    if not kept:
        raise RecipeError(f"data {source!r} has no rows to learn from (max_length={max_length})")


def _pieces(row: Any, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """The row's text in order, each piece with whether it is learned."""
    if not isinstance(row, dict):
        raise RecipeError(f"a row is a JSON object, not {json.dumps(row)[:60]}")
    row = {key: value for key, value in row.items() if value is not None}
    if "messages" in row:
        return _chat_pieces(row["messages"], row.get("tools"), tokenizer)
    wanted = ("prompt", "completion") if "prompt" in row or "completion" in row else ("text",)
    for key in wanted:
        if not isinstance(row.get(key), str):
            found = (
                f"{key!r} is {json.dumps(row[key])[:60]}" if key in row else f"this one has {', '.join(row) or 'none'}"
            )
            raise RecipeError(f"a row has `messages`, `prompt` and `completion`, or `text`, as text; {found}")
    return [(row[key], key != "prompt") for key in wanted]


def _chat_pieces(messages: Any, tools: Any, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages
    ):
        raise RecipeError('`messages` is a list of {"role": ..., "content": ...}')
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise RecipeError("`messages` has no turn with the role 'assistant' to learn from")

    def render(messages: list[dict[str, Any]], prompt: bool = False) -> str:
        if not messages:
            return ""
        try:
            return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt)
        except Exception as error:  # a template is a program of its own and can fail in any way
            raise RecipeError(f"the chat template refuses `messages`: {str(error).splitlines()[0]}") from error

    whole, pieces, done = render(messages), [], 0
    for turn in turns:
        before, through = messages[:turn], render(messages[: turn + 1])
        start = len(render(before, prompt=True))
        if not through.startswith(render(before, prompt=True)):
            # The template opens an answer otherwise for generation than in a transcript (`<think>`): learn from where
            # the transcript has the content.
            marked = render([*before, {**messages[turn], "content": _MARK}])
            start = marked.find(_MARK)
            if start < 0 or through[:start] != marked[:start]:
                raise RecipeError(
                    "the chat template does not show where an answer begins: use `prompt` and `completion`"
                )
        if not through.startswith(render(before)) or not whole.startswith(through):
            raise RecipeError(
                "the chat template rewrites earlier turns, so they cannot be learned as they are generated: "
                "use one answer a row, or `prompt` and `completion`"
            )
        pieces += [(whole[done:start], False), (whole[start : len(through)], True)]
        done = len(through)
    return [*pieces, (whole[done:], False)]


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                yield where, json.loads(line)
            except ValueError as error:
                raise RecipeError(f"{where}: not JSON ({error}); a JSONL file has one object a line") from error


def _hub_rows(name: str, split: str) -> tuple[Iterator[tuple[str, Any]], str]:
    try:
        data = datasets.load_dataset(name, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise RecipeError(f"cannot load data {name!r}, split {split!r}: {str(error).splitlines()[0]}") from error
    return ((f"{name}, row {number}", row) for number, row in enumerate(data)), data._fingerprint
