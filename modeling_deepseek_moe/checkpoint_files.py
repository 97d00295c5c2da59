"""Reading and checking checkpoint files before any tensor is read: headers, index, completeness."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .checkpoint_layout import expected_tensors, is_mtp_tensor, is_redundant
from .errors import CheckpointError
from .fp8_blocks import FP8_BLOCK, SCALE_SUFFIX, scale_shape

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
FP8_DTYPE = "F8_E4M3"
_DTYPE_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys((FP8_DTYPE, "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 1),
}
_SCALE_DTYPES = ("F32", "F8_E8M0")
_MAX_HEADER_BYTES = 100_000_000
_MAX_DIMENSIONS = 16
_NAMES_SHOWN = 5


class TensorEntry(NamedTuple):
    """One tensor of a safetensors file.

    Attributes:
        dtype: safetensors' own name, such as "BF16".
        shape: its dimensions.
        start: offset in the file of its first byte.
        stop: offset behind its last byte.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_entries(path: str | os.PathLike) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file in the header's order, checked against each other and the file's size.

    Raises:
        CheckpointError: the file is truncated, not safetensors, or its header contradicts itself or the size.
    """
    path = Path(path)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise CheckpointError(f"{path} is no whole safetensors file: {size} bytes, a header of {length} announced")
        try:
            header = read_json(file.read(length))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} has a safetensors header that is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a safetensors header that is not an object")
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, fields, 8 + length) for name, fields in header.items()}
    end, last = 8 + length, None
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.start != end:
            problem = "overlaps" if entry.start < end else "leaves a gap behind"
            raise CheckpointError(f"{path}: tensor {name} {problem} {last or 'the header'}")
        end, last = entry.stop, name
    if end != size:
        raise CheckpointError(f"{path} is truncated or padded: its header promises {end} bytes, it has {size}")
    return entries


def read_header(path: str | os.PathLike) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a safetensors file; checks and errors are those of `read_entries`."""
    return {name: entry.shape for name, entry in read_entries(path).items()}


def read_json(text: str | bytes) -> Any:
    """Parses JSON, but refuses an object that names a key twice (readers disagree on which of them counts).

    Raises:
        ValueError: not JSON, or a key twice.
    """
    return json.loads(text, object_pairs_hook=_object_of_unique_keys)


def read_index(folder: str | os.PathLike) -> dict[str, str]:
    """The file of every tensor as `model.safetensors.index.json` of a folder says: plain names of files in it.

    Raises:
        CheckpointError: an index that is not JSON, names a path outside the folder, or a missing shard.
    """
    index_path = Path(folder) / INDEX_NAME
    try:
        weight_map = read_json(index_path.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index_path} is not a safetensors index: {error!r}") from error
    for shard in shards:
        if not is_plain_name(shard):
            raise CheckpointError(f"{index_path} points outside its folder: {shard!r}")
        if not (Path(folder) / shard).is_file():
            lost = [name for name, file in weight_map.items() if file == shard]
            raise CheckpointError(f"{index_path} names the missing shard {shard} ({_listed(lost)})")
    return weight_map


def check_folder(folder: str | os.PathLike) -> None:
    """Checks the index of a local checkpoint folder, if it has one; errors are those of `read_index`."""
    if (Path(folder) / INDEX_NAME).is_file() and not (Path(folder) / SINGLE_NAME).is_file():
        read_index(folder)


def is_plain_name(name: Any) -> bool:
    """Whether `name` can only be a file directly in a folder, on any system."""
    return (
        isinstance(name, str)
        and name.isprintable()
        and name not in ("", ".", "..")
        and Path(name).name == name
        and not set(name) & set("\\:")
    )


def check_fp8_scales(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], source: str, block: tuple[int, int] = FP8_BLOCK
) -> None:
    """Checks that FP8 weights and scales come in pairs of matching shapes.

    Args:
        tensors: safetensors dtype and shape of every tensor.
        source: what to call the checkpoint in errors.
        block: rows and columns of a block.

    Raises:
        CheckpointError: names the weight without a scale, the scale without a weight, or the misfit.
    """
    for name, (dtype, shape) in tensors.items():
        if dtype == FP8_DTYPE:
            scale_dtype, found = tensors.get(name + SCALE_SUFFIX, (None, None))
            if found is None:
                raise CheckpointError(f"{source}: FP8 tensor {name} has no {name}{SCALE_SUFFIX}")
            if len(shape) != 2 or found != scale_shape(shape, block):
                raise CheckpointError(
                    f"{source}: {name}{SCALE_SUFFIX} is {list(found)}, which does not fit a weight of {list(shape)} "
                    f"in blocks of {block[0]}x{block[1]}"
                )
            if scale_dtype not in _SCALE_DTYPES:
                raise CheckpointError(
                    f"{source}: {name}{SCALE_SUFFIX} is {scale_dtype}, not one of {', '.join(_SCALE_DTYPES)}"
                )
        elif name.endswith(SCALE_SUFFIX):
            weight = name.removesuffix(SCALE_SUFFIX)
            if weight not in tensors:
                raise CheckpointError(f"{source}: {name} has no weight {weight}")
            if tensors[weight][0] != FP8_DTYPE:
                raise CheckpointError(f"{source}: {name} belongs to {weight}, which is {tensors[weight][0]}, not FP8")


def check_tensors(config, shapes: Mapping[str, tuple[int, ...]], with_head: bool, source: str) -> bool:
    """Compares the tensors of a checkpoint with what the config asks for, name by name.

    Args:
        config: the model's configuration.
        shapes: names and shapes found; a missing "model." prefix is fine, and so are stacked experts.
        with_head: whether `lm_head.weight` is needed.
        source: what to call the checkpoint in errors.

    Returns:
        Whether the MTP modules the config announces are there; False only if none of their tensors is.

    Raises:
        CheckpointError: lists missing and mis-shaped tensors.
    """
    found = {_base_name(name): tuple(shape) for name, shape in shapes.items()}
    prefix = "model." if any(name.startswith("model.") for name in shapes) else ""
    stacked = any(name.endswith("mlp.experts.gate_up_proj") for name in found)
    wanted = {}
    for name, (shape, _) in expected_tensors(config, stacked=stacked).items():
        name = _base_name(name)
        if not is_redundant(name) and (with_head or name != "lm_head.weight"):
            wanted[name] = shape
    has_mtp = any(is_mtp_tensor(name, config) and not is_redundant(name) for name in found)
    if not has_mtp:
        wanted = {name: shape for name, shape in wanted.items() if not is_mtp_tensor(name, config)}
    shown = {name: name if name == "lm_head.weight" else prefix + name for name in wanted}
    missing = [shown[name] for name in wanted if name not in found]
    wrong = [
        f"{shown[name]} is {list(found[name])} instead of {list(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name] != tuple(shape)
    ]
    problems = [f"{len(missing)} missing ({_listed(missing)})"] if missing else []
    problems += [f"{len(wrong)} of the wrong shape ({_listed(wrong)})"] if wrong else []
    if problems:
        raise CheckpointError(f"{source} does not fit its config: tensors {', '.join(problems)}")
    return has_mtp


def _base_name(name: str) -> str:
    return name.removeprefix("model.")


def _listed(names: list[str]) -> str:
    more = f", and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more


def _entry(path: Path, name: str, fields: Any, offset: int) -> TensorEntry:
    if not name.isprintable():
        raise CheckpointError(f"{path}: tensor name {name!a} has characters that cannot be printed")
    try:
        dtype, shape, (start, stop) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
        sound = isinstance(dtype, str) and len(shape) <= _MAX_DIMENSIONS
        sound = sound and set(map(type, (*shape, start, stop))) == {int}
    except (TypeError, KeyError, ValueError):
        sound = False
    if not sound:
        raise CheckpointError(f"{path}: the header entry of tensor {name} is malformed")
    width = _DTYPE_BYTES.get(dtype)
    fits = 0 <= start <= stop and min(shape, default=0) >= 0
    if not fits or (width and stop - start != math.prod(shape) * width):
        raise CheckpointError(f"{path}: tensor {name} of shape {list(shape)} spans {stop - start} bytes")
    return TensorEntry(dtype, shape, offset + start, offset + stop)


def _object_of_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"{twice!a} is there twice")
    return fields
