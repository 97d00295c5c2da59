"""Reads a finished conversion back: every tensor against its source, and a few tokens through both models."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import transformers

from modeling_deepseek_moe import DeepseekMoeForCausalLM
from modeling_deepseek_moe.checkpoint_layout import expected_tensors

from .plan import Plan, Step
from .recipes import Copy, Quantize
from .source import CONFIG_NAME, open_source
from .target import ConversionError
from .writing import Reader

_CHUNK_BYTES = 16 << 20
_TOKENS = 16
# Two implementations of one model in float32: sums in another order, over a few dozen layers.
_LOGIT_TOLERANCE = 1e-3
_NATIVE_CLASSES = {"deepseek_v2": "DeepseekV2ForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM"}


@dataclass(frozen=True)
class Verification:
    """What was compared; a difference that may not be is an error instead.

    Attributes:
        tensors: compared value by value, or known to be the source's own file.
        logits: largest difference between both models' logits over the largest logit; None if not run.
        reader: the class that the result was loaded with for that.
        skipped: why no tokens were run.
    """

    tensors: int
    logits: float | None = None
    reader: str = ""
    skipped: str = ""


def verify_conversion(plan: Plan, target: Path) -> Verification:
    """Compares a finished conversion with its source.

    Raises:
        CheckpointError: the result is not a sound checkpoint.
        ConversionError: a tensor or the logits differ; names file and tensor.
    """
    tensors = _verify_tensors(plan, target)
    needed = 4 * sum(torch.Size(shape).numel() for shape, _ in expected_tensors(plan.source.config).values())
    available = psutil.virtual_memory().available
    if 1.5 * needed > available:
        reason = f"the model needs {needed / 1e9:.1f} GB in float32, {available / 1e9:.1f} GB are free"
        return Verification(tensors, skipped=reason)
    return _verify_logits(plan, target, tensors)


def _verify_tensors(plan: Plan, target: Path) -> int:
    result = open_source(target)
    if result.entries.keys() != {spec.name for shard in plan.shards for spec in shard.tensors()}:
        raise ConversionError(f"{target} does not hold the tensors of the plan; remove it and convert again")
    count = 0
    with Reader(plan.source) as before, Reader(result) as after:
        for shard in plan.shards:
            path = target / shard.file
            is_link = shard.same_as is not None and path.samefile(plan.source.folder / shard.same_as)
            for step in shard.steps:
                problem = None if is_link else _problem(before, after, step)
                if problem:
                    raise ConversionError(f"{path}: tensor {step.outputs[0].name} {problem}; remove it, convert again")
                count += len(step.outputs)
    return count


def _problem(before: Reader, after: Reader, step: Step) -> str | None:
    if isinstance(step.recipe, Copy):
        return None if _same_bytes(before, after, step.sources[0]) else "differs from its source"
    sources = tuple(map(before.read, step.sources))
    outputs = tuple(after.read(spec.name) for spec in step.outputs)
    return step.recipe.problem(sources, outputs)


def _same_bytes(before: Reader, after: Reader, name: str) -> bool:
    one, other = before.source.entries[name], after.source.entries[name]
    if one[:2] != other[:2]:
        return False
    for begin in range(0, one.stop - one.start, _CHUNK_BYTES):
        count = min(_CHUNK_BYTES, one.stop - one.start - begin)
        data = os.pread(before.file(name), count, one.start + begin)
        if data != os.pread(after.file(name), count, other.start + begin):
            return False
    return True


@torch.no_grad()
def _verify_logits(plan: Plan, target: Path, tensors: int) -> Verification:
    dtype = plan.config_json.get("dtype") or plan.config_json.get("torch_dtype") or "float32"
    is_fp8 = "quantization_config" in plan.config_json
    # transformers' own class cannot read FP8 weights whose last blocks are cut off.
    native = None if is_fp8 else _NATIVE_CLASSES.get(plan.to)
    reader = getattr(transformers, native) if native else DeepseekMoeForCausalLM
    ids = torch.randint(plan.source.config.vocab_size, (1, _TOKENS), generator=torch.Generator().manual_seed(0))
    with _quiet_transformers():
        expected = _logits(DeepseekMoeForCausalLM, plan.source.folder, dtype, ids)
        found = _logits(reader, target, dtype, ids)
    difference = float((found - expected).abs().max() / expected.abs().max())
    exact = not any(isinstance(step.recipe, Quantize) for shard in plan.shards for step in shard.steps)
    if exact and not difference <= _LOGIT_TOLERANCE:
        raise ConversionError(
            f"{target / CONFIG_NAME}: {reader.__name__} computes logits that differ by {difference:.2g} of the largest"
        )
    return Verification(tensors, difference, reader.__name__)


def _logits(model_class, folder: Path, dtype: str, ids: torch.Tensor) -> torch.Tensor:
    """Logits in float32 arithmetic of the weights as they are in `dtype`."""
    options = {}
    if (folder / CONFIG_NAME).is_file() and "quantization_config" in (folder / CONFIG_NAME).read_text("utf-8"):
        options["quantization_config"] = transformers.FineGrainedFP8Config(dequantize=True)
    model = model_class.from_pretrained(folder, dtype=getattr(torch, dtype), **options)
    return model.float().eval()(ids).logits


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """transformers' classes would report MTP tensors as unexpected, and draw bars of their own."""
    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()
