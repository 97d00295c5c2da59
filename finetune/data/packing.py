"""Several rows in one sequence, none of which sees another.

Rows are packed by TRL's best-fit-decreasing strategy (arXiv 2404.10830), a thousand at a time. Positions start again
at 0 for each row, which is how transformers' masks, the multi-token loss and the balance losses tell the rows of a
sequence apart. The first label of each row is -100, so nothing is predicted across the border.
"""

from typing import TypeVar

import torch
from datasets import Dataset, IterableDataset

from modeling_deepseek_moe.distribution import install

from ..errors import RecipeError
from .chat import IGNORED

PACKED = "position_ids"  # the column that packed rows have
_Rows = TypeVar("_Rows", Dataset, IterableDataset)


def pack(data: _Rows, max_length: int) -> _Rows:
    """Rows of `input_ids` and `labels` in sequences of at most `max_length` tokens, with `position_ids`.

    The same rows give the same sequences; no row is cut.
    """
    try:
        from trl import pack_dataset
    except ImportError as error:
        raise RecipeError(f"`packing` needs TRL: {install('trl')}") from error
    return pack_dataset(data, max_length, "bfd").map(_with_positions, batched=True, remove_columns=["seq_lengths"])


def flatten(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Packed sequences one after the other in a batch of one row, `[1, tokens]`: no padding, and no mask for it.

    All attention implementations keep packed rows apart in a batch of one row; the flash ones only there.
    """
    return {
        key: torch.tensor([[token for row in rows for token in row[key]]]) for key in ("input_ids", "labels", PACKED)
    }


def _with_positions(sequences: dict[str, list]) -> dict[str, list]:
    positions = [[i for length in lengths for i in range(length)] for lengths in sequences["seq_lengths"]]
    labels = [
        [IGNORED if position == 0 else label for position, label in zip(*pair, strict=True)]
        for pair in zip(positions, sequences["labels"], strict=True)
    ]
    return {"labels": labels, PACKED: positions}
