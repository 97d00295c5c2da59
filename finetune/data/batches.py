"""Rows of token ids to the batches that a model trains on."""

import copy

import torch
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from .chat import IGNORED
from .packing import PACKED, flatten


class Collator:
    """Pads `input_ids` on the right and `labels` with -100; packed rows are not padded but put into one row.

    An object, not a function made on the way: data loaders that start their workers anew send it there.

    Args:
        tokenizer: EOS stands in for a missing padding token; it is not changed.
        pad_to_multiple_of: what the padded length is a multiple of.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, pad_to_multiple_of: int | None = None):
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.padding_side = "right"
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        self._padded = DataCollatorForSeq2Seq(
            tokenizer, pad_to_multiple_of=pad_to_multiple_of, label_pad_token_id=IGNORED
        )

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """`input_ids`, `labels` and `attention_mask` `[rows, T]`; of packed rows `position_ids` instead of a mask."""
        return flatten(rows) if PACKED in rows[0] else self._padded(rows)
