"""Reading and checking checkpoint files before any tensor is read: headers, index, completeness."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from .checkpoint_layout import expected_tensors, is_mtp_tensor, is_redundant

INDEX_NAME = "model.safetensors.index.json"
_DTYPE_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
_MAX_HEADER_BYTES = 100_000_000
_NAMES_SHOWN = 5


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded as it is; the message names file and tensor."""


def read_header(path: str | os.PathLike) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a safetensors file, checked against the file's size.

    Raises:
        CheckpointError: the file is truncated, not safetensors, or its header contradicts its size.
    """
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise CheckpointError(f"{path} is no whole safetensors file: {size} bytes, a header of {length} announced")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} has a safetensors header that is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a safetensors header that is not an object")
    header.pop("__metadata__", None)
    shapes, end = {}, 0
    for name, entry in header.items():
        try:
            shape, (start, stop) = tuple(map(int, entry["shape"])), map(int, entry["data_offsets"])
            width = _DTYPE_BYTES.get(entry["dtype"])
        except (TypeError, KeyError, ValueError, OverflowError) as error:
            raise CheckpointError(f"{path}: the header entry of tensor {name} is malformed") from error
        count = 1
        for dimension in shape:
            count *= dimension
        if not 0 <= start <= stop or (width and stop - start != count * width):
            raise CheckpointError(f"{path}: tensor {name} of shape {list(shape)} spans {stop - start} bytes")
        shapes[name], end = shape, max(end, stop)
    promised = 8 + length + end
    if promised != size:
        raise CheckpointError(f"{path} is truncated or padded: its header promises {promised} bytes, it has {size}")
    return shapes


def check_folder(folder: str | os.PathLike) -> None:
    """Checks the index of a local checkpoint folder, if it has one: plain names of files that are there.

    Raises:
        CheckpointError: an index that is not JSON, names a path outside the folder, or a missing shard.
    """
    index_path = Path(folder) / INDEX_NAME
    if not index_path.is_file() or (Path(folder) / "model.safetensors").is_file():
        return
    try:
        weight_map = json.loads(index_path.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index_path} is not a safetensors index: {error!r}") from error
    for shard in shards:
        if not isinstance(shard, str) or shard in ("", ".", "..") or Path(shard).name != shard or "\\" in shard:
            raise CheckpointError(f"{index_path} points outside its folder: {shard!r}")
        if not (Path(folder) / shard).is_file():
            lost = [name for name, file in weight_map.items() if file == shard]
            raise CheckpointError(f"{index_path} names the missing shard {shard} ({_listed(lost)})")


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
    for name, (shape, _) in expected_tensors(config).items():
        name = _base_name(name)
        if not is_redundant(name) and (with_head or name != "lm_head.weight"):
            name, shape = _stacked(name, shape, config) if stacked else (name, shape)
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


def _stacked(name: str, shape: tuple[int, ...], config) -> tuple[str, tuple[int, ...]]:
    """The in-memory tensor a per-expert tensor is part of; other tensors as they are."""
    before, separator, after = name.partition(".mlp.experts.")
    if not separator:
        return name, shape
    experts, width, hidden = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
    if after.endswith("down_proj.weight"):
        return f"{before}.mlp.experts.down_proj", (experts, hidden, width)
    return f"{before}.mlp.experts.gate_up_proj", (experts, 2 * width, hidden)


def _listed(names: list[str]) -> str:
    more = f", and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more
