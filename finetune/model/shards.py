"""Whole models saved by all processes together, of which none ever holds all: the files of `save_pretrained`.

A file's weights are gathered one after the other, and kept by the process that writes the file; that of file n is
process n, round and round. What a process needs is the memory of one file and of one gathered weight.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from modeling_deepseek_moe.checkpoint_files import INDEX_NAME, SINGLE_NAME
from modeling_deepseek_moe.checkpoint_layout import MTP_COPIES
from modeling_deepseek_moe.loading import keep_stacks

from .._compat import as_published, plainly
from ..files import remove, write_text
from .gather import shape_of, whole

LARGEST_FILE = 5_000_000_000  # bytes
Entry = tuple[str, str, torch.Tensor]


@torch.no_grad()
def save_in_shards(model: PreTrainedModel, folder: Path, largest: int = LARGEST_FILE) -> None:
    """Saves a model of which each process may hold a part, as one process saves it; every process calls it.

    Args:
        model: of this package, without a wrapper.
        folder: new, the same in every process, on a disk that all of them share.
        largest: bytes of a file; one weight of the model (a layer's experts are two) is never cut.
    """
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    if rank == 0:
        with plainly(model):
            model.save_pretrained(folder, state_dict={})  # what is beside the weights
        remove([folder / SINGLE_NAME])
    keep_stacks(model)
    torch.distributed.barrier()
    files = list(_files(model, largest))
    names = (
        [SINGLE_NAME]
        if len(files) == 1
        else [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    )
    written: dict[str, tuple[str, int]] = {}
    for number, (name, entries) in enumerate(zip(names, files, strict=True)):
        kept = {}
        for published, own, tensor in entries:
            with whole(own, tensor) as values:
                if number % ranks == rank:
                    kept[published] = values.detach().to("cpu", copy=True)
        if number % ranks == rank:
            kept = {key: value.contiguous() for key, value in as_published(model, kept).items()}
            save_file(kept, folder / name, metadata={"format": "pt"})
            written |= {key: (name, value.nbytes) for key, value in kept.items()}
    found: list[Any] = [None] * ranks
    torch.distributed.all_gather_object(found, written)
    if rank == 0 and len(files) > 1:
        _write_index(folder, {key: place for part in found for key, place in part.items()})
    torch.distributed.barrier()


def _files(model: PreTrainedModel, largest: int) -> Iterator[list[Entry]]:
    """What stands in each file, the same in every process."""
    file, size = [], 0
    for entry in _entries(model):
        tensor = entry[2]
        nbytes = torch.Size(shape_of(tensor)).numel() * tensor.element_size()
        if file and size + nbytes > largest:
            yield file
            file, size = [], 0
        file.append(entry)
        size += nbytes
    if file:
        yield file


def _entries(model: PreTrainedModel) -> Iterator[Entry]:
    """Each weight by the name that it is saved by and its own, with the copies that DeepSeek publishes of some."""
    state = model.state_dict(keep_vars=True)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for name, tensor in state.items():
        if name not in tied:
            yield name, name, tensor
    config = model.config
    for layer in range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers):
        for name, source in MTP_COPIES.items():
            yield f"model.layers.{layer}.{name}", source, state[source]


def _write_index(folder: Path, places: dict[str, tuple[str, int]]) -> None:
    metadata = {"total_size": sum(nbytes for _, nbytes in places.values())}
    index = {"metadata": metadata, "weight_map": {key: name for key, (name, _) in sorted(places.items())}}
    write_text(folder / INDEX_NAME, json.dumps(index, indent=2) + "\n")
