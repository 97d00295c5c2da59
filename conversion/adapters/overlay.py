"""A checkpoint some of whose tensors are those of another folder."""

import copy
import dataclasses
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from modeling_deepseek_moe import CheckpointError
from modeling_deepseek_moe.families import with_text_fields
from modeling_deepseek_moe.fp8_blocks import SCALE_SUFFIX

from ..engine.source import SourceCheckpoint, TensorFolder


@dataclass(frozen=True)
class OverlaidCheckpoint(SourceCheckpoint):
    """A `SourceCheckpoint` in which tensors are replaced: each keeps its place, and `file_of` names its new file.

    Attributes:
        base: the checkpoint below.
    """

    base: SourceCheckpoint

    @cached_property
    def names_of_file(self) -> dict[str, list[str]]:
        files = self.base.names_of_file.items()
        return {file: [name for name in names if name in self.entries] for file, names in files}

    def is_whole(self, file: str) -> bool:
        names = self.base.names_of_file[file]
        return self.base.is_whole(file) and all(self.file_of.get(name) == file for name in names)


@dataclass(frozen=True)
class UntiedCheckpoint(SourceCheckpoint):
    """A checkpoint with one weight for embedding and head, read as one that has it twice."""

    def is_whole(self, file: str) -> bool:
        return self.file_of["lm_head.weight"] != file


def untied(base: SourceCheckpoint) -> SourceCheckpoint:
    """`base`, whose embedding is its head too, with a head of its own of the same values."""
    name = "model.embed_tokens.weight"
    config = copy.deepcopy(base.config)
    config.tie_word_embeddings = False
    fields = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)} | {
        "config": config,
        "config_json": with_text_fields(base.config_json, {"tie_word_embeddings": False}),
        "file_of": base.file_of | {"lm_head.weight": base.file_of[name]},
        "entries": base.entries | {"lm_head.weight": base.entries[name]},
    }
    return UntiedCheckpoint(**fields)


def overlaid(base: SourceCheckpoint, other: TensorFolder, keys: dict[str, str]) -> SourceCheckpoint:
    """`base` with tensors of `other` in place of its own.

    Args:
        base: a checkpoint under published names.
        other: folder of the new tensors.
        keys: what each replaced tensor, scales of FP8 weights included, is called in `other`.

    Raises:
        CheckpointError: a tensor that `base` does not have, or of another shape, or FP8 where the base is not.
    """
    if not keys:
        return base
    if type(base) not in (SourceCheckpoint, UntiedCheckpoint):
        raise CheckpointError(
            f"{base.folder} is not under the published names, so {other.folder} cannot replace tensors of it; convert "
            "it to bf16 first"
        )
    file_of, entries = dict(base.file_of), dict(base.entries)
    for name, key in keys.items():
        path = other.folder / other.file_of[key]
        if name not in base.entries:
            raise CheckpointError(f"{path}: tensor {key} replaces {name}, which {base.folder} does not have")
        shape, expected = other.entries[key].shape, base.entries[name].shape
        if shape != expected:
            raise CheckpointError(f"{path}: tensor {key} is {list(shape)} instead of {list(expected)}")
        if other.is_fp8(key) and not base.is_fp8(name):
            raise CheckpointError(
                f"{path}: tensor {key} is FP8, but that of {base.folder} is not; convert one of them"
            )
        if base.is_fp8(name) and not other.is_fp8(key):
            del entries[name + SCALE_SUFFIX], file_of[name + SCALE_SUFFIX]
        file_of[name], entries[name] = str(path), other.entries[key]
    fields = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)}
    return OverlaidCheckpoint(**{**fields, "file_of": file_of, "entries": entries}, base=base)


def is_below(folder: Path, parent: Path) -> bool:
    """Whether `folder` is `parent` or lies in it, links resolved."""
    return folder.resolve().is_relative_to(parent.resolve())
