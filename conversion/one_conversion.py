"""Conversion of a whole checkpoint: check, plan, write, verify, report."""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .engine.operations import QuantizationError
from .engine.plan import Plan
from .engine.target import ConversionError, open_target, unfinished, write_rest
from .engine.writing import disk_full, is_disk_full, write_shards
from .formats.table import DTYPES
from .request import plan_request
from .upcycle.dense import open_dense
from .upcycle.split import UPCYCLE, UpcycleOptions, plan_upcycle
from .upcycle_report import Rows, UpcycleLosses, check_rows, measure_losses, verify_upcycle
from .verify import Verification, verify_conversion


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did, or would do.

    Attributes:
        plan: files and tensors.
        target: the folder.
        actions: "linked", "copied", "converted", or "kept" from an earlier call, for every weight file; empty for a
            dry run.
        errors: what FP8 cost, for every part of the model whose weights this call quantized.
        verification: what was compared, if that was asked for.
        losses: what "upcycle" measured if text was given; why it could not, if the models do not fit in memory.
        seconds: how long it took.
    """

    plan: Plan
    target: Path
    actions: dict[str, str] = field(default_factory=dict)
    errors: dict[str, QuantizationError] = field(default_factory=dict)
    verification: Verification | None = None
    losses: UpcycleLosses | str | None = None
    seconds: float = 0.0

    def lines(self) -> Iterator[str]:
        """The report as text, line by line."""
        yield from self.plan.notes
        files = len(self.plan.shards)
        tensors = f"{self.plan.tensor_count:,} tensors, {self.plan.size:,} bytes in {files} file{'s' * (files > 1)}"
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
        if isinstance(self.losses, UpcycleLosses):
            yield from self.losses.lines()
        elif self.losses:
            yield f"no losses were measured: {self.losses}"


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    to: str,
    *,
    dtype: str | None = None,
    source_format: str | None = None,
    mp: int | None = None,
    adapter: str | os.PathLike | None = None,
    only: Sequence[str] | str | None = None,
    base: str | os.PathLike | None = None,
    kv_b_proj: str | None = None,
    upcycle: UpcycleOptions | None = None,
    data: Iterable[tuple[list[int], list[int]]] | None = None,
    verify: bool = False,
    dry_run: bool = False,
    copy: bool = False,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> ConversionReport:
    """Converts a checkpoint folder to another format, tensor by tensor, whatever its size.

    A call that was killed is finished by the same call; the result is the same to the byte. The source is only read.
    Weight files in which nothing changes are hard-linked, so a program that writes into them in place changes both.

    Args:
        source: a folder with `config.json` and safetensors, per-expert names as DeepSeek publishes them, or one that
            "deepseek-inference" makes.
        target: a folder that is new, empty, or left by the same conversion.
        to: a key of `FORMATS` or `ADAPTER_FORMATS`, or "upcycle".
        dtype: "bfloat16", "float16" or "float32" for the weights that are not FP8 afterwards.
        source_format: "deepseek-inference" if the folder could be taken for something else.
        mp: model-parallel ranks of "deepseek-inference", 1 by default.
        adapter: folder of a LoRA or ESFT adapter that is merged into the weights.
        only: modules whose LoRA is merged, such as "kv_b_proj"; all by default.
        base: the checkpoint that "esft" compares with.
        kv_b_proj: "keep" or "leave-out": LoRA on `kv_b_proj` in "peft-per-expert".
        upcycle: how "upcycle" cuts the feed-forwards of a dense Llama, Qwen2 or Qwen3 folder.
        data: rows of token ids and labels (-100 where nothing is predicted) whose loss "upcycle" reports, of the dense
            model and of the result before training; what they raise is raised before anything is written.
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
    only = [only] if isinstance(only, str) else only
    options = {"source_format": source_format, "mp": mp, "adapter": adapter, "only": only or None}
    options |= {"base": base, "kv_b_proj": kv_b_proj}
    if to == UPCYCLE:
        plan = _plan_upcycle(source, upcycle, dtype, options)
        record = {"to": to, "dtype": dtype, **asdict(upcycle)}
    elif upcycle is not None or data is not None:
        name = "data" if upcycle is None else "upcycle"
        raise ValueError(f"{name} belongs to the format {UPCYCLE!r}, not to {to!r}")
    else:
        request = plan_request(source, target, to, {"dtype": dtype, **options})
        plan, record = request.plan, request.record
    target = Path(target)
    rows: Rows | None = None if data is None else list(data)
    if rows:  # only "upcycle" takes them; the source of another format may be an adapter, which has no vocabulary
        check_rows(rows, plan.source)
    if dry_run:
        return ConversionReport(plan, target, seconds=time.monotonic() - start)

    def done(file: str, count: int) -> None:
        if on_progress:
            on_progress(file, count, plan.size)

    try:
        with open_target(plan, target, record):
            missing = unfinished(plan, target)
            actions = dict.fromkeys((shard.file for shard in plan.shards), "kept")
            for shard in plan.shards:
                if shard not in missing:
                    done(shard.file, shard.size)
            written, errors = write_shards(plan, missing, target, not copy, done)
            if missing or not (target / plan.config_name).is_file():
                write_rest(plan, target)
    except OSError as error:
        if is_disk_full(error):
            raise disk_full(target, error.strerror) from error
        where = error.filename or target
        raise ConversionError(f"{where}: {error.strerror}; finished files stay, and the same call goes on") from error
    verification = (verify_upcycle if to == UPCYCLE else verify_conversion)(plan, target) if verify else None
    losses = measure_losses(plan, target, rows) if rows else None
    return ConversionReport(plan, target, actions | written, errors, verification, losses, time.monotonic() - start)


def _plan_upcycle(source, upcycle: UpcycleOptions | None, dtype: str | None, others: dict) -> Plan:
    given = next((name for name, value in others.items() if value is not None), None)
    if given:
        raise ValueError(f"{given}={others[given]!r} does not belong to the format {UPCYCLE!r}")
    if upcycle is None:
        raise ValueError(f"the format {UPCYCLE!r} needs experts, shared_experts and top_k")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    return plan_upcycle(open_dense(source), upcycle, DTYPES[dtype] if dtype else None)


def _verified(verification: Verification) -> str:
    line = f"verified {verification.tensors} tensors"
    if verification.logits is None:
        return f"{line}; no tokens were run: {verification.skipped}"
    if verification.absolute is not None:
        return f"{line}; with all experts active, logits differ from the dense model's by {verification.absolute:.1e}"
    return f"{line}; logits of {verification.reader} differ by {verification.logits:.1e} of the largest"
