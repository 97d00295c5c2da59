"""The folder a conversion writes: whose it is, and writing so that a kill leaves nothing that looks finished.

.NAME.part       a file that is being written; renamed to NAME when it is whole and on disk
conversion.json  written first: which conversion the folder belongs to; the same call goes on in it, others are refused
*.safetensors    and then tokenizer, licence and so on
model.safetensors.index.json  config.json  written last, and taken away first if anything before them is missing
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from modeling_deepseek_moe import CheckpointError
from modeling_deepseek_moe.checkpoint_files import INDEX_NAME, SINGLE_NAME

from .beside import RECORD_NAME
from .plan import Plan, Shard

_PART_SUFFIX = ".part"


class ConversionError(CheckpointError):
    """A conversion that cannot be started or finished; the message says what to do."""


def part_path(path: Path) -> Path:
    """Where `path` is written before it is whole."""
    return path.with_name(f".{path.name}{_PART_SUFFIX}")


def finish(path: Path) -> None:
    """Makes the part of `path` durable and gives it its name."""
    part = part_path(path)
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    part.replace(path)


def is_finished(path: Path, shard: Shard, source_folder: Path) -> bool:
    """Whether the file is there as planned: size and header decide, since it got its name when it was whole."""
    if not path.is_file():
        return False
    if shard.same_as is not None:
        original = source_folder / shard.same_as
        return path.samefile(original) or _same_head(path, original)
    head = shard.layout[0]
    with path.open("rb") as file:
        return os.fstat(file.fileno()).st_size == shard.size and file.read(len(head)) == head


@contextlib.contextmanager
def open_target(plan: Plan, target: Path, options: dict[str, Any]) -> Iterator[None]:
    """Holds the target folder for one conversion; left-over parts are removed on the way in and out.

    After an error in the source nothing stays in the folder. After any other interruption the finished files do, and
    the same call goes on from there.

    Args:
        plan: what is to be written.
        target: the folder, made if it is not there.
        options: what makes this conversion another one than a call with other options.

    Raises:
        ConversionError: the folder holds something else, or belongs to a conversion that is running; or this system
            cannot lock folders.
    """
    try:
        import fcntl
    except ImportError as error:
        raise ConversionError(
            "a conversion locks the folder that it writes, which this system cannot: run it on Linux or macOS"
        ) from error
    record = {**options, "source": plan.source.fingerprint()}
    if target.resolve().is_relative_to(plan.source.folder):
        raise ConversionError(f"{target} lies in the source {plan.source.folder}; give a folder outside of it")
    if target.exists() and not target.is_dir():
        raise ConversionError(f"{target} is a file; give a folder")
    is_new = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    folder = os.open(target, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConversionError(f"{target} is being written by another conversion; wait for it") from error
        _claim(target, record)
        try:
            yield
        except ConversionError:
            raise
        except CheckpointError:
            _remove_parts(target)
            _remove_results(plan, target)
            if is_new:
                with contextlib.suppress(OSError):
                    target.rmdir()
            raise
        finally:
            _remove_parts(target)
    finally:
        os.close(folder)


def unfinished(plan: Plan, target: Path) -> list[Shard]:
    """The files still to be written; if there are any, the folder stops looking like a checkpoint."""
    missing = [shard for shard in plan.shards if not is_finished(target / shard.file, shard, plan.source.folder)]
    if missing:
        for name in (plan.config_name, INDEX_NAME):
            (target / name).unlink(missing_ok=True)
    return missing


def write_rest(plan: Plan, target: Path) -> None:
    """Everything beside the weights, in the order that makes the folder a checkpoint with the last one."""
    for name in plan.other_files:
        shutil.copyfile(plan.source.folder / name, part_path(target / name))
        finish(target / name)
    for name, value in plan.json_files.items():
        _write_json(target / name, value)
    if plan.with_index and [shard.file for shard in plan.shards] != [SINGLE_NAME]:
        _write_json(target / INDEX_NAME, plan.index())
    _sync_names(target)  # the config must not be there before the others, even after a power failure
    _write_json(target / plan.config_name, plan.config_json)
    _sync_names(target)


def _claim(target: Path, record: dict[str, Any]) -> None:
    path = target / RECORD_NAME
    if path.is_file():
        try:
            found = json.loads(path.read_bytes())
        except ValueError:
            found = None
        if found != record:
            raise ConversionError(
                f"{target} belongs to another conversion (its {RECORD_NAME} differs: another source, a source that "
                "has changed since, or other options); give another folder, or remove this one"
            )
        _remove_parts(target)
        return
    strangers = sorted(name for name in os.listdir(target) if name != part_path(path).name)
    if strangers:
        raise ConversionError(f"{target} is not empty ({strangers[0]}); give a new folder")
    _write_json(path, record)


def _write_json(path: Path, value: Any) -> None:
    part_path(path).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    finish(path)


def _sync_names(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_parts(target: Path) -> None:
    for path in target.glob(f".*{_PART_SUFFIX}"):
        path.unlink(missing_ok=True)


def _remove_results(plan: Plan, target: Path) -> None:
    shards = (shard.file for shard in plan.shards)
    for name in (plan.config_name, INDEX_NAME, *shards, *plan.other_files, *plan.json_files, RECORD_NAME):
        (target / name).unlink(missing_ok=True)


def _same_head(path: Path, original: Path) -> bool:
    if path.stat().st_size != original.stat().st_size:
        return False
    with path.open("rb") as one, original.open("rb") as other:
        length = one.read(8)
        rest = int.from_bytes(length, "little")
        return other.read(8) == length and one.read(rest) == other.read(rest)
