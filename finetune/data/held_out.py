"""Rows held out of a data set, to measure the loss on: whole documents, never a part of one that is learned."""

import datasets
import numpy as np
from accelerate import PartialState
from rich.console import Console
from rich.text import Text

from ..errors import UserError

DOCUMENT = "document"  # the column that says of which row of the source a part is


def hold_out(
    data: datasets.Dataset, share: float, seed: int, source: str
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """The rows to learn and the rows to measure on, without the column `document`.

    Args:
        data: rows; parts of one document follow each other, and have the same `document`. Without that column every
            row is a document.
        share: of the documents to hold out, but at least one; 0 for none.
        seed: which ones.
        source: of the rows, for the line that says that one document is too few.

    Raises:
        UserError: none would be left to learn.
    """
    if DOCUMENT not in data.column_names:
        starts = range(len(data))
    else:
        documents = data.with_format("numpy")[DOCUMENT][:]
        starts = np.flatnonzero(np.diff(documents, prepend=-1))
        data = data.remove_columns(DOCUMENT)
    if not share:
        return data, None
    if len(starts) == 1:
        if PartialState().is_main_process:
            alone = f"{source} has one document, so none is held out: give `eval_data` to measure the loss"
            Console().print(Text(alone), soft_wrap=True)
        return data, None
    size = max(1, round(len(starts) * share))
    if size == len(starts):
        raise UserError(
            f"`eval_fraction` is {share}, which holds out all {size} documents of {source} and leaves none to learn: "
            "lower it, or give `eval_data`"
        )
    if len(starts) == len(data):
        sides = data.train_test_split(test_size=size, seed=seed)
        return sides["train"], sides["test"]
    parts = np.split(np.arange(len(data)), starts[1:])
    sides = datasets.Dataset.from_dict({"place": range(len(parts))}).train_test_split(test_size=size, seed=seed)
    train, test = (data.select(np.concatenate([parts[i] for i in sides[side]["place"][:]])) for side in sides)
    return train, test
