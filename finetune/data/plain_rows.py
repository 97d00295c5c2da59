"""The first tokens of a text or JSONL file as rows of ids and labels, for a loss before any training."""

import json
from collections.abc import Iterator
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from modeling_deepseek_moe.errors import CheckpointError

from ..errors import first_line
from .chat import encode

Row = tuple[list[int], list[int]]  # token ids, and labels with -100 where nothing is predicted
_ROW_TOKENS = 512
_DATA_TOKENS = 8192


def read_rows(model: Path, data: Path) -> Iterator[Row]:
    """Rows of at most 512 tokens, 8,192 tokens in all: of a text file, or of a JSONL file as fine-tuning reads it.

    Nothing is read before the first row is asked for.

    Args:
        model: folder with the tokenizer.
        data: the file.

    Raises:
        CheckpointError: no such file, no tokenizer, or no text to predict.
        RowError: a row of a JSONL file that fine-tuning would refuse.
    """
    if not data.is_file():
        raise CheckpointError(f"{data} is not a file; give a text file or a JSONL file")
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # tokenizer files can be broken in any way
        raise CheckpointError(f"{model} has no tokenizer that can be used: {first_line(error)}") from error
    try:
        text = data.read_text("utf-8")
        rows = _json_rows(text, tokenizer) if data.suffix in (".jsonl", ".json") else _text_rows(text, tokenizer)
        rows = [row for row in rows if any(label >= 0 for label in row[1][1:])]
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{data} is not text in UTF-8: {error}") from error
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{data} has a line that is not JSON: {error}") from error
    if not rows:
        raise CheckpointError(f"{data} has no two tokens to compute a loss of")
    yield from rows


def _text_rows(text: str, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    # A token is at least one byte of at most four: no need to tokenize more.
    ids = tokenizer(text[: 64 * _DATA_TOKENS], add_special_tokens=False, verbose=False)["input_ids"][:_DATA_TOKENS]
    rows = [ids[start : start + _ROW_TOKENS] for start in range(0, len(ids), _ROW_TOKENS)]
    return [(row, row) for row in rows]


def _json_rows(text: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[Row]:
    count = 0
    for line in text.splitlines():
        if line.strip() and count < _DATA_TOKENS:
            row = encode(json.loads(line), tokenizer, _ROW_TOKENS)
            count += len(row[0])
            yield row
