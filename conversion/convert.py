"""Conversion of a whole checkpoint: check, plan, write, verify, report."""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .formats import plan_conversion
from .plan import Plan
from .recipes import QuantizationError
from .source import CONFIG_NAME, open_source
from .target import ConversionError, open_target, unfinished, write_rest
from .verify import Verification, verify_conversion
from .writing import disk_full, is_disk_full, write_shards


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did, or would do.

    Attributes:
        plan: files and tensors.
        target: the folder.
        actions: "linked", "copied", "converted", or "kept" from an earlier call, for every weight file; empty for a
            dry run.
        errors: what FP8 cost, for every class of weights that this call quantized.
        verification: what was compared, if that was asked for.
        seconds: how long it took.
    """

    plan: Plan
    target: Path
    actions: dict[str, str] = field(default_factory=dict)
    errors: dict[str, QuantizationError] = field(default_factory=dict)
    verification: Verification | None = None
    seconds: float = 0.0

    def lines(self) -> Iterator[str]:
        """The report as text."""
        tensors = f"{self.plan.tensor_count} tensors, {self.plan.size} bytes in {len(self.plan.shards)} files"
        if not self.actions:
            yield f"{self.plan.source.folder} -> {self.target}: {tensors} (dry run, nothing is written)"
            return
        counts = {action: list(self.actions.values()).count(action) for action in dict.fromkeys(self.actions.values())}
        done = ", ".join(f"{count} {action}" for action, count in counts.items())
        yield f"{self.target}: {tensors} ({done}) in {self.seconds:.1f} s"
        for name, error in self.errors.items():
            yield (
                f"FP8 error of {error.tensors} tensors of {name}: {error.relative:.2%} of the weights' norm, at most "
                f"{error.largest:.2%} of a tensor's largest weight"
            )
        if self.verification:
            yield _verified(self.verification)


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    to: str,
    *,
    dtype: str | None = None,
    verify: bool = False,
    dry_run: bool = False,
    copy: bool = False,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> ConversionReport:
    """Converts a checkpoint folder to another format, tensor by tensor, whatever its size.

    A call that was killed is finished by the same call; the result is the same to the byte. The source is only read.
    Weight files in which nothing changes are hard-linked, so a program that writes into them in place changes both.

    Args:
        source: a folder with `config.json` and safetensors, per-expert names as DeepSeek publishes them.
        target: a folder that is new, empty, or left by the same conversion.
        to: a key of `FORMATS`.
        dtype: "bfloat16", "float16" or "float32" for the weights that are not FP8 afterwards.
        verify: read both sides back and compare every tensor, then a few tokens through both models if they fit.
        dry_run: only check the source and plan; the target is not touched.
        copy: copy unchanged files, never link them.
        on_progress: called with a file's name, the bytes done since the last call, and those of all files together.

    Raises:
        ValueError: an unknown format or dtype.
        CheckpointError: the source is broken, or the format cannot express it; nothing stays in the target.
        ConversionError: the target cannot be written; says what to do.
    """
    start = time.monotonic()
    plan = plan_conversion(open_source(source), to, dtype)
    target = Path(target)
    if dry_run:
        return ConversionReport(plan, target, seconds=time.monotonic() - start)

    def done(file: str, count: int) -> None:
        if on_progress:
            on_progress(file, count, plan.size)

    try:
        with open_target(plan, target, {"to": to, "dtype": dtype}):
            missing = unfinished(plan, target)
            actions = dict.fromkeys((shard.file for shard in plan.shards), "kept")
            for shard in plan.shards:
                if shard not in missing:
                    done(shard.file, shard.size)
            written, errors = write_shards(plan, missing, target, not copy, done)
            if missing or not (target / CONFIG_NAME).is_file():
                write_rest(plan, target)
    except OSError as error:
        if is_disk_full(error):
            raise disk_full(target, error.strerror) from error
        where = error.filename or target
        raise ConversionError(f"{where}: {error.strerror}; finished files stay, and the same call goes on") from error
    verification = verify_conversion(plan, target) if verify else None
    return ConversionReport(plan, target, actions | written, errors, verification, time.monotonic() - start)


def _verified(verification: Verification) -> str:
    line = f"verified {verification.tensors} tensors"
    if verification.logits is None:
        return f"{line}; no tokens were run: {verification.skipped}"
    return f"{line}; logits of {verification.reader} differ by {verification.logits:.1e} of the largest"
