"""Reads a finished conversion back: every tensor against its source, and a few tokens through both models."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import transformers

from modeling_deepseek_moe import DeepseekMoeConfig, DeepseekMoeForCausalLM
from modeling_deepseek_moe.checkpoint_layout import expected_tensors
from modeling_deepseek_moe.families import text_config_dict

from .engine.operations import Copy, Quantize
from .engine.plan import Plan, Step
from .engine.slices import innermost
from .engine.source import CONFIG_NAME, SourceCheckpoint
from .engine.target import ConversionError
from .engine.writing import Reader, same_bytes
from .formats.inference_config import INFERENCE
from .formats.inference_source import JoinedCheckpoint, RankFiles, open_ranks
from .formats.table import plan_plain

TOKENS = 16
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
        absolute: that difference itself, where the format has a bound for it.
    """

    tensors: int
    logits: float | None = None
    reader: str = ""
    skipped: str = ""
    absolute: float | None = None


def verify_conversion(plan: Plan, target: Path) -> Verification:
    """Compares a finished conversion with its source.

    Raises:
        CheckpointError: the result is not a sound checkpoint.
        ConversionError: a tensor or the logits differ; names file and tensor.
    """
    tensors = verify_tensors(plan, target)
    if plan.without_logits:
        return Verification(tensors, skipped=plan.without_logits)
    reason = too_large(plan.source.config)
    if reason:
        return Verification(tensors, skipped=reason)
    return _verify_logits(plan, target, tensors)


def too_large(config: DeepseekMoeConfig) -> str:
    """Why a model cannot be run here in float32; empty if it can."""
    needed = 4 * sum(torch.Size(shape).numel() for shape, _ in expected_tensors(config).values())
    available = psutil.virtual_memory().available
    if 1.5 * needed > available:
        return f"the model needs {needed / 1e9:.1f} GB in float32, {available / 1e9:.1f} GB are free"
    return ""


def verify_tensors(plan: Plan, target: Path) -> int:
    """Compares every tensor of a finished conversion with its source, and counts them; errors as above."""
    result = plan.read_back(target)
    planned = {result.key(shard.file, spec.name) for shard in plan.shards for spec in shard.tensors()}
    if result.entries.keys() != planned:
        raise ConversionError(f"{target} does not hold the tensors of the plan; remove it and convert again")
    count = 0
    with Reader(plan.source) as before, Reader(result) as after:
        for shard in plan.shards:
            path = target / shard.file
            is_link = shard.same_as is not None and path.samefile(plan.source.folder / shard.same_as)
            for step in shard.steps:
                names = [result.key(shard.file, spec.name) for spec in step.outputs]
                problem = None if is_link else _problem(before, after, step, names)
                if problem:
                    raise ConversionError(f"{path}: tensor {step.outputs[0].name} {problem}; remove it, convert again")
                count += len(step.outputs)
    return count


def _problem(before: Reader, after: Reader, step: Step, names: list[str]) -> str | None:
    """What is wrong with the outputs of a step, which are called `names` where they are read back."""
    if isinstance(step.operation, Copy):
        return None if same_bytes(before, after, step.sources[0], names[0]) else "differs from its source"
    sources = tuple(map(before.read, step.sources))
    return step.operation.problem(sources, tuple(map(after.read, names)))


@torch.no_grad()
def _verify_logits(plan: Plan, target: Path, tensors: int) -> Verification:
    written = text_config_dict(plan.config_json)
    dtype = written.get("dtype") or written.get("torch_dtype") or "float32"
    is_fp8 = "quantization_config" in written
    # transformers' own class cannot read FP8 weights whose last blocks are cut off.
    native = None if is_fp8 else _NATIVE_CLASSES.get(plan.to)
    reader = getattr(transformers, native) if native else DeepseekMoeForCausalLM
    ids = torch.randint(plan.source.config.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    with quiet_transformers():
        expected = _logits(DeepseekMoeForCausalLM, _loadable(plan.source), dtype, ids)
        # Of the ranks' ModelArgs alone, which must say everything that the model computes.
        result = open_ranks(target, with_published_config=False) if plan.to == INFERENCE else target
        found = _logits(reader, result, dtype, ids)
    difference = float((found - expected).abs().max() / expected.abs().max())
    exact = not any(isinstance(innermost(step.operation), Quantize) for shard in plan.shards for step in shard.steps)
    if exact and not difference <= _LOGIT_TOLERANCE:
        raise ConversionError(
            f"{target / CONFIG_NAME}: {reader.__name__} computes logits that differ by {difference:.2g} of the largest"
        )
    return Verification(tensors, difference, reader.__name__)


def _loadable(source: SourceCheckpoint) -> Path | JoinedCheckpoint:
    return open_ranks(source.folder) if isinstance(source, RankFiles) else source.folder


def _logits(model_class, folder: Path | JoinedCheckpoint, dtype: str, ids: torch.Tensor) -> torch.Tensor:
    """Logits in float32 arithmetic of the weights as they are in `dtype`."""
    if isinstance(folder, JoinedCheckpoint):
        config, weights = _plain_weights(plan_plain(folder, getattr(torch, dtype)))
        model = model_class.from_pretrained(None, config=config, state_dict=weights, dtype=getattr(torch, dtype))
        del weights
        return model.float().eval()(ids).logits
    options = {}
    if (folder / CONFIG_NAME).is_file() and "quantization_config" in (folder / CONFIG_NAME).read_text("utf-8"):
        options["quantization_config"] = transformers.FineGrainedFP8Config(dequantize=True)
    if model_class is DeepseekMoeForCausalLM:
        options["text_only"] = True
    model = model_class.from_pretrained(folder, dtype=getattr(torch, dtype), **options)
    return model.float().eval()(ids).logits


def _plain_weights(plan: Plan) -> tuple[DeepseekMoeConfig, dict[str, torch.Tensor]]:
    """Config and state dict of what `plan` would write."""
    weights = {}
    with Reader(plan.source) as reader:
        for step in (step for shard in plan.shards for step in shard.steps):
            tensors = step.operation.apply(*map(reader.read, step.sources))
            weights |= zip((spec.name for spec in step.outputs), tensors, strict=True)
    return DeepseekMoeConfig.from_dict(dict(plan.config_json)), weights


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
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
