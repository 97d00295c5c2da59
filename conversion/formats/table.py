"""The formats that `convert` writes: which weights are FP8, which type the others have, and the config beside them.

A format with names of its own makes its `Plan` from steps and operations in the same way; the worker knows no format.
"""

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from modeling_deepseek_moe import CheckpointError
from modeling_deepseek_moe.checkpoint_layout import is_fp8_weight, is_redundant
from modeling_deepseek_moe.families import FAMILIES, TEXT_PREFIX, text_config_dict, with_text_fields, wrapper_of
from modeling_deepseek_moe.fp8_blocks import SCALE_SUFFIX, scale_shape

from ..adapters.merging import AppliedAdapter
from ..engine.beside import without_local_code
from ..engine.operations import Cast, Copy, Dequantize, Quantize
from ..engine.plan import Plan, Shard, Step, TensorSpec, shards_like_source
from ..engine.source import SourceCheckpoint, open_source
from ..upcycle.split import UPCYCLE
from .inference_config import INFERENCE
from .inference_plan import cut, joined
from .inference_source import JoinedCheckpoint, holds_ranks, open_ranks
from .native import NATIVE_MODELS, rope_notes

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Format:
    """One row of the table.

    Attributes:
        summary: one line for the command's help.
        fp8: whether attention and MLP weights are FP8 blocks; None leaves them as they are.
        dtype: type of the other weights; None leaves each as it is.
        config_json: the new `config.json`, without dtype and quantization, which the plan adds.
        keeps_code: whether the code of a tokenizer that is code still belongs to the result.
    """

    summary: str
    fp8: bool | None
    dtype: torch.dtype | None
    config_json: Callable[[SourceCheckpoint], dict[str, Any]]
    keeps_code: bool


def _same_config(source: SourceCheckpoint) -> dict[str, Any]:
    config_json = without_local_code(source.config_json)
    if source.lost_mtp_layers:
        announced = [name for name in ("num_nextn_predict_layers", "num_mtp_layers") if name in source.text_json]
        config_json = with_text_fields(config_json, dict.fromkeys(announced or ["num_nextn_predict_layers"], 0))
    return config_json


def _text_config(source: SourceCheckpoint) -> dict[str, Any]:
    return text_config_dict(_same_config(source))


def _native(model_type: str) -> Format:
    def config_json(source: SourceCheckpoint) -> dict[str, Any]:
        return NATIVE_MODELS[model_type].config_json(source.config)

    summary = f"the model type {model_type} that transformers, vLLM, SGLang and llama.cpp know"
    return Format(summary, fp8=None, dtype=None, config_json=config_json, keeps_code=False)


FORMATS = {
    "bf16": Format("plain bfloat16 weights", False, torch.bfloat16, _same_config, keeps_code=True),
    "fp8": Format("FP8 blocks of 128x128, as DeepSeek-V3 is published", True, torch.bfloat16, _same_config, True),
    "plain": Format("weights as they are, FP8 ones as bfloat16", False, None, _same_config, keeps_code=True),
    **{model_type: _native(model_type) for model_type in NATIVE_MODELS},
    INFERENCE: Format("DeepSeek's own model-parallel files and their ModelArgs", None, None, _text_config, True),
}


def open_checkpoint(folder: str | os.PathLike, source_format: str | None = None) -> SourceCheckpoint:
    """A checkpoint to convert, in either of the two layouts that are read.

    Args:
        folder: the checkpoint's folder.
        source_format: "deepseek-inference"; by default that if the folder has files of ranks and nothing else, and
            safetensors under published names otherwise.

    Raises:
        ValueError: another format.
        CheckpointError: as `open_source` and `open_ranks` do.
    """
    if source_format not in (None, INFERENCE):
        raise ValueError(f"source format {source_format!r} is not {INFERENCE!r}, the only one to be named")
    return open_ranks(folder) if source_format or holds_ranks(folder) else open_source(folder)


def plan_conversion(
    source: SourceCheckpoint,
    to: str,
    dtype: str | None = None,
    mp: int | None = None,
    adapter: AppliedAdapter | None = None,
) -> Plan:
    """What converting `source` writes.

    Args:
        source: the checkpoint that is read.
        to: a key of `FORMATS`.
        dtype: a key of `DTYPES`: the type of all weights that are not FP8 afterwards. FP8 weights of the source become
            plain ones, unless the format is FP8 itself. By default what the format says.
        mp: model-parallel ranks of "deepseek-inference", 1 by default.
        adapter: what is merged into `source`; FP8 weights then become plain ones as with a dtype.

    Raises:
        ValueError: no such format or dtype, or an option that contradicts the format.
        CheckpointError: the format cannot express the model; names the field.
    """
    if to not in FORMATS:
        raise ValueError(f"format {to!r} is not one of {', '.join([*FORMATS, UPCYCLE])}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if to == "bf16" and dtype not in (None, "bfloat16"):
        raise ValueError(f"dtype {dtype!r} contradicts the format 'bf16'; name the model type as the format instead")
    if mp is not None and (to != INFERENCE or mp < 1):
        raise ValueError(f"mp={mp} must be at least 1, and belongs to the format {INFERENCE!r}, not to {to!r}")
    row = FORMATS[to]
    plain_dtype = DTYPES[dtype] if dtype else row.dtype
    fp8 = False if (dtype or adapter) and row.fp8 is None else row.fp8
    _check_fp8(source, fp8)
    adapter = adapter or AppliedAdapter(source)
    source = adapter.source
    keeps_parts = row.config_json is _same_config

    def step_of(name: str) -> Step | None:
        if source.is_other_part(name):
            return _copy(source, name) if keeps_parts else None
        return adapter.step(name, lambda name: _step(source, name, fp8, plain_dtype), plain_dtype)

    shards = shards_like_source(source, step_of)
    notes = rope_notes(source.config) if to in NATIVE_MODELS else ()
    if source.wrapper:
        shards = tuple(_in_wrapper(shard, source) if keeps_parts else _alone(shard) for shard in shards)
        notes += () if keeps_parts else (_left_out(source, to),)
    written = {spec.dtype for shard in shards for spec in shard.tensors()}
    config_json = _with_weights(row.config_json(source), source, torch.float8_e4m3fn in written, plain_dtype)
    others = tuple(name for name in source.other_files if row.keeps_code or not name.endswith(".py"))
    plan = Plan(source, to, shards, config_json, others, notes=notes, without_logits=adapter.without_logits)
    if to == INFERENCE:
        plan = cut(plan, mp or 1)
    return joined(plan) if isinstance(source, JoinedCheckpoint) else plan


def plan_plain(source: SourceCheckpoint, dtype: torch.dtype) -> Plan:
    """The plan of all weights in `dtype` and under published names, for a model that is loaded from it."""
    shards = shards_like_source(source, lambda name: _step(source, name, False, dtype))
    plan = Plan(source, "", shards, _with_weights(_same_config(source), source, False, dtype), ())
    return joined(plan) if isinstance(source, JoinedCheckpoint) else plan


def _step(source: SourceCheckpoint, name: str, fp8: bool | None, dtype: torch.dtype | None) -> Step | None:
    is_scale = name.endswith(SCALE_SUFFIX)
    if source.is_fp8(name.removesuffix(SCALE_SUFFIX)) and fp8 is False:
        if is_scale:
            return None
        plain = dtype or torch.bfloat16
        spec = TensorSpec(name, plain, source.entries[name].shape)
        return Step(Dequantize(plain, source.block), (name, name + SCALE_SUFFIX), (spec,))
    shape, found = source.entries[name].shape, source.dtype(name)
    if fp8 and is_fp8_weight(name) and not source.is_fp8(name):
        scale = TensorSpec(name + SCALE_SUFFIX, torch.float32, scale_shape(shape, source.block))
        return Step(Quantize(source.block), (name,), (TensorSpec(name, torch.float8_e4m3fn, shape), scale))
    wanted = torch.float32 if name.endswith("e_score_correction_bias") else dtype
    if is_scale or dtype is None or wanted == found or source.is_fp8(name) or _is_rotary_table(name):
        return _copy(source, name)
    return Step(Cast(wanted), (name,), (TensorSpec(name, wanted, shape),))


def _check_fp8(source: SourceCheckpoint, fp8: bool | None) -> None:
    family = source.config.family
    if fp8 and family is not None and not FAMILIES[family].has_fp8_blocks:
        raise CheckpointError(
            f"{source.folder}: a {family} is published in FP8 with one scale a matrix and with scales of activations, "
            "which weights do not tell; 'fp8' makes blocks, so convert it to 'bf16'"
        )


def _copy(source: SourceCheckpoint, name: str) -> Step:
    return Step(Copy(), (name,), (TensorSpec(name, source.dtype(name), source.entries[name].shape),))


def _in_wrapper(shard: Shard, source: SourceCheckpoint) -> Shard:
    """The file with the text part's tensors under the names that they have in the whole model."""

    def renamed(spec: TensorSpec) -> TensorSpec:
        is_other = source.is_other_part(spec.name)
        return spec if is_other else dataclasses.replace(spec, name=TEXT_PREFIX + spec.name)

    steps = (Step(step.operation, step.sources, tuple(map(renamed, step.outputs))) for step in shard.steps)
    return dataclasses.replace(shard, steps=tuple(steps))


def _alone(shard: Shard) -> Shard:
    """The file as one of a text model, whose tensors have other names than in the source's file."""
    return dataclasses.replace(shard, same_as=None)


def _left_out(source: SourceCheckpoint, to: str) -> str:
    count = len(source.entries) - len(source.text_names)
    parts = ", ".join(f"{part}*" for part in source.wrapper.other_parts)
    return f"left out: {count} tensors of {parts}, since {to} is a text model; 'bf16' and 'plain' keep them"


def _is_rotary_table(name: str) -> bool:
    return is_redundant(name) and name.endswith("inv_freq")


def _with_weights(
    config_json: dict[str, Any], source: SourceCheckpoint, is_fp8: bool, dtype: torch.dtype | None
) -> dict[str, Any]:
    """`config_json` with what is true of the weights."""
    before = source.text_json.get("dtype") or source.text_json.get("torch_dtype")
    name = next((name for name, value in DTYPES.items() if value == dtype), before)
    config_json = _with_dtype(config_json, name)
    wrapper = wrapper_of(config_json)
    if wrapper:
        config_json["text_config"] = _with_dtype(config_json["text_config"], name)
    if is_fp8:
        config_json["quantization_config"] = source.text_json.get("quantization_config") or {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(source.block),
            **({"modules_to_not_convert": [part.strip(".") for part in wrapper.other_parts]} if wrapper else {}),
        }
    return config_json


def _with_dtype(config_json: dict[str, Any], name: str | None) -> dict[str, Any]:
    """`config_json` without a quantization, and with this type of the weights."""
    config_json = {key: value for key, value in config_json.items() if key != "quantization_config"}
    spellings = [spelling for spelling in ("dtype", "torch_dtype") if spelling in config_json]
    return config_json if name is None else config_json | dict.fromkeys(spellings or ["torch_dtype"], name)
