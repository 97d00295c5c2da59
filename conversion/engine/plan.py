"""What a conversion will write: files, the tensors in them, and the step that makes each; nothing is read for it."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from .beside import CONFIG_NAME
from .operations import Copy, Operation
from .source import SAFETENSORS_DTYPES, SourceCheckpoint, TensorFolder, open_source


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of a tensor to write."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes of the tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Step:
    """Tensors that are made together: `operation.apply(*sources)` gives `outputs`, in that order."""

    operation: Operation
    sources: tuple[str, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Shard:
    """A safetensors file to write.

    Attributes:
        file: its name.
        steps: what makes its tensors.
        same_as: a source file with these very tensors, which can be linked instead; None if there is none.
    """

    file: str
    steps: tuple[Step, ...]
    same_as: str | None = None

    def tensors(self) -> Iterator[TensorSpec]:
        """The tensors of the file, in the order of its steps."""
        for step in self.steps:
            yield from step.outputs

    @cached_property
    def layout(self) -> tuple[bytes, dict[str, int]]:
        """Everything before the tensors' bytes, and where in the file each tensor begins.

        The order is that of the safetensors library: wide types first, so that all are aligned, then by name.
        """
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        begins, offset = {}, 0
        for spec in sorted(self.tensors(), key=lambda spec: (_WIDTH_ORDER.index(spec.dtype), spec.name)):
            header[spec.name] = {
                "dtype": SAFETENSORS_DTYPES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [offset, offset + spec.size],
            }
            begins[spec.name] = offset
            offset += spec.size
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        head = len(text).to_bytes(8, "little") + text
        return head, {name: len(head) + begin for name, begin in begins.items()}

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.layout[0]) + sum(spec.size for spec in self.tensors())


@dataclass(frozen=True)
class Plan:
    """A whole conversion.

    Attributes:
        source: the folder that is read.
        to: the format's name.
        shards: weight files to write.
        config_json: the new configuration.
        other_files: names of files that are copied along.
        config_name: the configuration's file, which is written last.
        with_index: whether several weight files have an index.
        json_files: what else is written, by name of the file.
        notes: what the user should know about the result, one line each.
        read_back: opens what was written, for verification.
        without_logits: why no tokens can be run through both sides; empty if they can.
    """

    source: TensorFolder
    to: str
    shards: tuple[Shard, ...]
    config_json: dict[str, Any]
    other_files: tuple[str, ...]
    config_name: str = CONFIG_NAME
    with_index: bool = True
    json_files: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    read_back: Callable[[Path], TensorFolder] = open_source
    without_logits: str = ""

    @property
    def size(self) -> int:
        """Bytes of all weight files."""
        return sum(shard.size for shard in self.shards)

    @property
    def tensor_count(self) -> int:
        """How many tensors are written."""
        return sum(len(step.outputs) for shard in self.shards for step in shard.steps)

    def index(self) -> dict[str, Any]:
        """The new `model.safetensors.index.json`."""
        weight_map = {spec.name: shard.file for shard in self.shards for spec in shard.tensors()}
        total = sum(spec.size for shard in self.shards for spec in shard.tensors())
        return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}

    def lines(self) -> Iterator[str]:
        """The plan as text: one line a file, and one line a tensor with its type, shape, bytes and origin."""
        for shard in self.shards:
            how = f", the same tensors as {shard.same_as}" if shard.same_as else ""
            yield f"{shard.file}: {shard.size} bytes{how}"
            for step in shard.steps:
                origin = f"{type(step.operation).__name__.lower()} {' '.join(step.sources)}"
                for spec in step.outputs:
                    dtype = SAFETENSORS_DTYPES[spec.dtype]
                    yield f"    {spec.name} {dtype} {list(spec.shape)} {spec.size} bytes <- {origin}"


_WIDTH_ORDER = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu, torch.float8_e4m3fn]


def shards_like_source(source: SourceCheckpoint, step_of) -> tuple[Shard, ...]:
    """One file for each of the source's, with its name; files that keep no tensor are left out.

    Args:
        source: the checkpoint that is read.
        step_of: the `Step` for a tensor's name, or None if the tensor itself is not in the output.
    """
    shards = []
    for file, names in source.names_of_file.items():
        steps = tuple(step for step in map(step_of, names) if step is not None)
        if not steps:
            continue
        copied = len(steps) == len(names) and all(isinstance(step.operation, Copy) for step in steps)
        unchanged = copied and source.is_whole(file)
        shards.append(Shard(file, steps, same_as=file if unchanged else None))
    return tuple(shards)
