"""The worker: reads ahead, applies operations, and writes each file, tensor by tensor at its planned place."""

import errno
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import torch

from modeling_deepseek_moe import CheckpointError
from modeling_deepseek_moe.parts import part_of

from .operations import Copy, QuantizationError, Quantize
from .plan import Plan, Shard, Step
from .slices import Joined
from .source import SourceCheckpoint
from .target import ConversionError, finish, part_path

_READERS = 4
# Tensors are converted side by side, each by one thread: in a small operation threads mostly wait for each other.
_WORKERS = min(8, os.cpu_count() or 1)
# Tensors read but not yet converted hold at most this much memory, or one group if that is larger.
_READ_AHEAD_BYTES = 256 << 20
_CHUNK_BYTES = 16 << 20

Progress = Callable[[str, int], None]


class Reader:
    """Reads tensors of a checkpoint without mapping the files, so that memory holds only what is asked for."""

    def __init__(self, source: SourceCheckpoint):
        self.source = source
        self._files: dict[str, int] = {}

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *exception) -> None:
        for file in self._files.values():
            os.close(file)

    def file(self, name: str) -> int:
        """Descriptor of the file that tensor `name` is in."""
        file = self.source.file_of[name]
        if file not in self._files:
            self._files[file] = os.open(self.source.folder / file, os.O_RDONLY)
        return self._files[file]

    def read(self, name: str) -> torch.Tensor:
        """The tensor of this name, in memory of its own.

        Raises:
            CheckpointError: the file ends before the tensor does.
        """
        entry = self.source.entries[name]
        data = torch.empty(entry.stop - entry.start, dtype=torch.uint8)
        view, position = memoryview(data.numpy()), 0
        while position < len(view):
            count = os.preadv(self.file(name), [view[position:]], entry.start + position)
            if not count:
                raise self.too_short(name)
            position += count
        return data.view(self.source.dtype(name)).view(entry.shape)

    def too_short(self, name: str) -> CheckpointError:
        """The error of a file that ends before tensor `name` does."""
        path = self.source.folder / self.source.file_of[name]
        return CheckpointError(f"{path} ends within tensor {name}; it has changed since the start")


def same_bytes(before: Reader, after: Reader, source: str, output: str) -> bool:
    """Whether two tensors have the same type, shape and bytes; read in chunks."""
    one, other = before.source.entries[source], after.source.entries[output]
    if one[:2] != other[:2]:
        return False
    for begin in range(0, one.stop - one.start, _CHUNK_BYTES):
        count = min(_CHUNK_BYTES, one.stop - one.start - begin)
        data = os.pread(before.file(source), count, one.start + begin)
        if data != os.pread(after.file(output), count, other.start + begin):
            return False
    return True


def write_shards(
    plan: Plan, shards: list[Shard], target: Path, link: bool, on_progress: Progress
) -> tuple[dict[str, str], dict[str, QuantizationError]]:
    """Writes the weight files `shards` of a plan.

    Args:
        plan: the plan that they belong to.
        shards: those still to be written.
        target: the folder.
        link: whether a file that stays as it is becomes a hard link, where the file system can; else a copy.
        on_progress: told the file and the bytes that are done since the last call.

    Returns:
        "linked", "copied" or "converted" for every file, and what FP8 cost in each part of the model.

    Raises:
        CheckpointError: the source cannot be converted; names file and tensor.
        ConversionError: not enough disk space.
    """
    _check_space(plan, shards, target, link)
    actions: dict[str, str] = {}
    errors: dict[str, QuantizationError] = {}
    # Waiting for the disk overlaps with the next file's work.
    with ThreadPoolExecutor(1) as finisher, _one_thread_workers() as workers, Reader(plan.source) as reader:
        finishing: Future | None = None
        for shard in shards:
            path = target / shard.file
            if shard.same_as and link and _link(plan.source.folder / shard.same_as, path):
                actions[shard.file] = "linked"
                on_progress(shard.file, shard.size)
                continue
            if shard.same_as:
                actions[shard.file] = "copied"
                _copy_file(plan.source.folder / shard.same_as, part_path(path), shard.file, on_progress)
            else:
                actions[shard.file] = "converted"
                _convert_file(reader, shard, part_path(path), workers, errors, on_progress)
            if finishing:
                finishing.result()
            finishing = finisher.submit(finish, path)
        if finishing:
            finishing.result()
    return actions, errors


def _check_space(plan: Plan, shards: list[Shard], target: Path, link: bool) -> None:
    same_device = target.stat().st_dev == plan.source.folder.stat().st_dev
    needed = sum(shard.size for shard in shards if not (link and same_device and shard.same_as))
    free = shutil.disk_usage(target).free
    if needed > free:
        raise disk_full(target, f"{needed} bytes are needed, {free} are free")


def disk_full(target: Path, detail: str) -> ConversionError:
    """The error of a disk on which the rest of a conversion has no room."""
    return ConversionError(f"not enough space in {target}: {detail}; finished files stay, and the same call goes on")


def is_disk_full(error: OSError) -> bool:
    """Whether the disk, or the user's share of it, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def _link(original: Path, path: Path) -> bool:
    try:
        path.unlink(missing_ok=True)
        os.link(original.resolve(), path)
    except OSError:  # another file system, or one without links, or another user's file
        return False
    return True


def _copy_file(original: Path, part: Path, shard_file: str, on_progress: Progress) -> None:
    with original.open("rb") as source, part.open("wb") as file:
        size = os.fstat(source.fileno()).st_size
        position = 0
        while position < size:
            count = copy_range(source.fileno(), file.fileno(), min(size - position, _CHUNK_BYTES), position, position)
            if not count:
                raise CheckpointError(f"{original} became shorter while it was read")
            position += count
            on_progress(shard_file, count)


@contextmanager
def _one_thread_workers() -> Iterator[ThreadPoolExecutor]:
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(_WORKERS, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(threads)  # what a worker sets is partly the whole process's


def _convert_file(
    reader: Reader,
    shard: Shard,
    part: Path,
    workers: ThreadPoolExecutor,
    errors: dict[str, QuantizationError],
    on_progress: Progress,
) -> None:
    head, begins = shard.layout
    running: deque[tuple[Step, Future]] = deque()

    def wait_for_first() -> None:
        step, future = running.popleft()
        if error := future.result():
            errors.setdefault(part_of(step.outputs[0].name), QuantizationError()).merge(error)
        on_progress(shard.file, sum(spec.size for spec in step.outputs))

    with part.open("wb") as file, ExitStack() as stack:
        file.truncate(shard.size)
        _write(file.fileno(), head, 0)
        on_progress(shard.file, len(head))
        ahead = stack.enter_context(closing(_read_ahead(reader, shard.steps)))
        stack.callback(lambda: wait([future for _, future in running]))  # the file is closed after them
        for step, sources in ahead:
            if sources is None:
                _copy_tensor(reader, step, file.fileno(), begins[step.outputs[0].name])
                on_progress(shard.file, sum(spec.size for spec in step.outputs))
                continue
            if len(running) == _WORKERS:
                wait_for_first()
            running.append((step, workers.submit(_convert_tensors, reader, step, sources, file.fileno(), begins)))
        while running:
            wait_for_first()


def _read_ahead(reader: Reader, steps: tuple[Step, ...]) -> Iterator[tuple[Step, tuple[torch.Tensor, ...] | None]]:
    """The steps with their sources, read by several threads a bounded number of bytes ahead; None for a plain copy."""
    pending: deque = deque()
    held = 0
    with ThreadPoolExecutor(_READERS) as pool:
        try:
            for step in steps:
                size = 0 if isinstance(step.operation, Copy) else sum(map(reader.source.size, step.sources))
                while pending and held + size > _READ_AHEAD_BYTES:
                    earlier, futures, freed = pending.popleft()
                    yield earlier, _results(futures)
                    held -= freed
                if not isinstance(step.operation, Copy):
                    for name in step.sources:
                        reader.file(name)  # opened here, so that two threads do not open it twice
                    futures = [pool.submit(reader.read, name) for name in step.sources]
                else:
                    futures = None
                pending.append((step, futures, size))
                held += size
            for step, futures, _ in pending:
                yield step, _results(futures)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _results(futures: list[Future] | None) -> tuple[torch.Tensor, ...] | None:
    return None if futures is None else tuple(future.result() for future in futures)


def _convert_tensors(
    reader: Reader, step: Step, sources: tuple[torch.Tensor, ...], file: int, begins: dict[str, int]
) -> QuantizationError | None:
    """Writes the outputs of a step, and measures what FP8 cost."""
    operation = step.operation
    try:
        if isinstance(operation, Joined):
            operation, sources = operation.operation, operation.join(sources)
        outputs = operation.apply(*sources)
    except ValueError as error:
        path = reader.source.folder / reader.source.file_of[step.sources[0]]
        raise CheckpointError(f"{path}: tensor {step.sources[0]} {error}") from error
    for spec, output in zip(step.outputs, outputs, strict=True):
        _write(file, output.contiguous().view(torch.uint8).numpy().reshape(-1), begins[spec.name])
    if not isinstance(operation, Quantize):
        return None
    error = QuantizationError()
    error.add(sources[0], *outputs, operation.block)
    return error


def _copy_tensor(reader: Reader, step: Step, file: int, begin: int) -> None:
    name = step.sources[0]
    entry = reader.source.entries[name]
    done, size = 0, entry.stop - entry.start
    while done < size:
        count = copy_range(reader.file(name), file, min(size - done, _CHUNK_BYTES), entry.start + done, begin + done)
        if not count:
            raise reader.too_short(name)
        done += count


def copy_range(source: int, file: int, count: int, source_offset: int, offset: int) -> int:
    """Copies bytes between files, within the kernel where it can; returns how many, 0 at the source's end."""
    if hasattr(os, "copy_file_range"):
        try:
            return os.copy_file_range(source, file, count, source_offset, offset)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
                raise
    data = os.pread(source, count, source_offset)
    _write(file, data, offset)
    return len(data)


def _write(file: int, data, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(file, view, offset)
        view, offset = view[count:], offset + count
