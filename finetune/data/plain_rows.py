"""The first tokens of a text or of a file of rows as ids and labels, for a loss before any training."""

from collections.abc import Iterator
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from modeling_deepseek_moe.errors import CheckpointError

from ..errors import first_line
from .chat import encode
from .files import file_rows, is_rows_file
from .report import RowError

Row = tuple[list[int], list[int]]  # token ids, and labels with -100 where nothing is predicted
_ROW_TOKENS = 512
_DATA_TOKENS = 8192


def read_rows(model: Path, data: Path) -> Iterator[Row]:
    """Rows of at most 512 tokens, 8,192 tokens in all: of a text file, or of a file of rows as fine-tuning reads it.

    Nothing is read before the first row is asked for.

    Args:
        model: folder with the tokenizer.
        data: the file.

    Raises:
        CheckpointError: no such file, no tokenizer, or no text to predict.
        RowError: a row that fine-tuning would refuse, with its line.
    """
    if not data.is_file():
        raise CheckpointError(f"{data} is not a file; give a text file or a file of rows (JSONL, JSON, CSV, Parquet)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # tokenizer files can be broken in any way
        raise CheckpointError(f"{model} has no tokenizer that can be used: {first_line(error)}") from error
    found = _file_rows(data, tokenizer) if is_rows_file(data) else _text_rows(data, tokenizer)
    rows = [row for row in found if any(label >= 0 for label in row[1][1:])]
    if not rows:
        raise CheckpointError(f"{data} has no two tokens to compute a loss of")
    yield from rows


def _text_rows(data: Path, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    try:
        text = data.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{data} is not text in UTF-8: {error}") from error
    # A token is at least one byte of at most four: no need to tokenize more.
    ids = tokenizer(text[: 64 * _DATA_TOKENS], add_special_tokens=False, verbose=False)["input_ids"][:_DATA_TOKENS]
    rows = [ids[start : start + _ROW_TOKENS] for start in range(0, len(ids), _ROW_TOKENS)]
    return [(row, row) for row in rows]


def _file_rows(data: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[Row]:
    count = 0
    for where, row in file_rows(data):
        try:
            if isinstance(row, RowError):
                raise row
            encoded = encode(row, tokenizer, _ROW_TOKENS)
        except RowError as error:
            raise RowError(f"{data}, {where}: {error}", error.reason) from error
        yield encoded
        count += len(encoded[0])
        if count >= _DATA_TOKENS:
            return
