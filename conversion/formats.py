"""The formats that `convert` writes: which weights are FP8, which type the others have, and the config beside them.

A format with names of its own makes its `Plan` from steps and recipes in the same way; the worker knows no format.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from modeling_deepseek_moe.checkpoint_layout import is_fp8_weight, is_redundant
from modeling_deepseek_moe.fp8_blocks import SCALE_SUFFIX, scale_shape

from .native_configs import NATIVE_MODELS
from .plan import Plan, Step, TensorSpec, shards_like_source
from .recipes import Cast, Copy, Dequantize, Quantize
from .source import SourceCheckpoint

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Format:
    """One row of the table.

    Attributes:
        summary: one line for the command's help.
        fp8: whether attention and MLP weights are FP8 blocks; None leaves them as they are.
        dtype: of the other weights; None leaves each as it is.
        config_json: the new `config.json`, without dtype and quantization, which the plan adds.
        keeps_code: whether the source's own Python files still belong to the result.
    """

    summary: str
    fp8: bool | None
    dtype: torch.dtype | None
    config_json: Callable[[SourceCheckpoint], dict[str, Any]]
    keeps_code: bool


def _same_config(source: SourceCheckpoint) -> dict[str, Any]:
    config_json = dict(source.config_json)
    if source.lost_mtp_layers:
        announced = [name for name in ("num_nextn_predict_layers", "num_mtp_layers") if name in config_json]
        config_json |= dict.fromkeys(announced or ["num_nextn_predict_layers"], 0)
    return config_json


def _native(model_type: str) -> Format:
    def config_json(source: SourceCheckpoint) -> dict[str, Any]:
        return NATIVE_MODELS[model_type].config_json(source.config)

    summary = f"the model type {model_type} that transformers, vLLM, SGLang and llama.cpp know"
    return Format(summary, fp8=None, dtype=None, config_json=config_json, keeps_code=False)


FORMATS = {
    "bf16": Format("plain bfloat16 weights", False, torch.bfloat16, _same_config, keeps_code=True),
    "fp8": Format("FP8 blocks of 128x128, as DeepSeek-V3 is published", True, torch.bfloat16, _same_config, True),
    **{model_type: _native(model_type) for model_type in NATIVE_MODELS},
}


def plan_conversion(source: SourceCheckpoint, to: str, dtype: str | None = None) -> Plan:
    """What converting `source` writes.

    Args:
        source: the checkpoint that is read.
        to: a key of `FORMATS`.
        dtype: a key of `DTYPES`: the type of all weights that are not FP8 afterwards. FP8 weights of the source become
            plain ones, unless the format is FP8 itself. By default what the format says.

    Raises:
        ValueError: no such format or dtype, or one that contradicts the other.
        CheckpointError: the format cannot express the model; names the field.
    """
    if to not in FORMATS:
        raise ValueError(f"format {to!r} is not one of {', '.join(FORMATS)}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if to == "bf16" and dtype not in (None, "bfloat16"):
        raise ValueError(f"dtype {dtype!r} contradicts the format 'bf16'; name the model type as the format instead")
    row = FORMATS[to]
    plain_dtype = DTYPES[dtype] if dtype else row.dtype
    fp8 = False if dtype and row.fp8 is None else row.fp8

    def step_of(name: str) -> Step | None:
        return _step(source, name, fp8, plain_dtype)

    shards = shards_like_source(source, step_of)
    written = {spec.dtype for shard in shards for spec in shard.tensors()}
    config_json = _with_weights(row.config_json(source), source, torch.float8_e4m3fn in written, plain_dtype)
    others = tuple(name for name in source.other_files if row.keeps_code or not name.endswith(".py"))
    return Plan(source, to, shards, config_json, others)


def _step(source: SourceCheckpoint, name: str, fp8: bool | None, dtype: torch.dtype | None) -> Step | None:
    is_scale = name.endswith(SCALE_SUFFIX)
    if source.is_fp8(name.removesuffix(SCALE_SUFFIX)) and fp8 is False:
        if is_scale:
            return None
        spec = TensorSpec(name, dtype, source.entries[name].shape)
        return Step(Dequantize(dtype, source.block), (name, name + SCALE_SUFFIX), (spec,))
    shape, found = source.entries[name].shape, source.dtype(name)
    if fp8 and is_fp8_weight(name) and not source.is_fp8(name):
        scale = TensorSpec(name + SCALE_SUFFIX, torch.float32, scale_shape(shape, source.block))
        return Step(Quantize(source.block), (name,), (TensorSpec(name, torch.float8_e4m3fn, shape), scale))
    wanted = torch.float32 if name.endswith("e_score_correction_bias") else dtype
    if is_scale or dtype is None or wanted == found or source.is_fp8(name) or _is_rotary_table(name):
        return Step(Copy(), (name,), (TensorSpec(name, found, shape),))
    return Step(Cast(wanted), (name,), (TensorSpec(name, wanted, shape),))


def _is_rotary_table(name: str) -> bool:
    return is_redundant(name) and name.endswith("inv_freq")


def _with_weights(
    config_json: dict[str, Any], source: SourceCheckpoint, is_fp8: bool, dtype: torch.dtype | None
) -> dict[str, Any]:
    """`config_json` with what is true of the weights."""
    config_json = dict(config_json)
    config_json.pop("quantization_config", None)
    before = source.config_json.get("dtype") or source.config_json.get("torch_dtype")
    name = next((name for name, value in DTYPES.items() if value == dtype), before)
    spellings = [spelling for spelling in ("dtype", "torch_dtype") if spelling in config_json]
    if name is not None:
        config_json |= dict.fromkeys(spellings or ["torch_dtype"], name)
    if is_fp8:
        config_json["quantization_config"] = source.config_json.get("quantization_config") or {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(source.block),
        }
    return config_json
