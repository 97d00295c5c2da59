"""A dense checkpoint to make experts of: Llama, Qwen2 or Qwen3, checked as `open_source` checks those of the family.

What is read is expressed as a `DeepseekMoeConfig` without experts. Tensor names are the same, so the same checks hold.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from modeling_deepseek_moe import CheckpointError, DeepseekMoeConfig
from modeling_deepseek_moe.checkpoint_files import FP8_DTYPE, TensorEntry
from modeling_deepseek_moe.fp8_blocks import FP8_BLOCK

from ..engine.beside import CONFIG_NAME, check_links, other_files, read_config
from ..engine.source import SourceCheckpoint, check_against_config, read_headers, weight_files

ZERO_BIAS = "self_attn.o_proj.bias"


@dataclass(frozen=True)
class DenseModel:
    """One dense model type.

    Attributes:
        config_class: transformers' own, which knows the fields that a `config.json` omits.
        architecture: the only class whose checkpoints are read.
        query_bias: whether queries, keys and values have a bias and the output has none; else `attention_bias` says.
        use_qk_norm: whether every query and key head is normalised.
    """

    config_class: type[PreTrainedConfig]
    architecture: str
    query_bias: bool = False
    use_qk_norm: bool = False


DENSE_MODELS = {
    "llama": DenseModel(LlamaConfig, "LlamaForCausalLM"),
    "qwen2": DenseModel(Qwen2Config, "Qwen2ForCausalLM", query_bias=True),
    "qwen3": DenseModel(Qwen3Config, "Qwen3ForCausalLM", use_qk_norm=True),
}

# Fields of a config.json with the only values that the result can express; absent is always fine.
_ONLY = {
    "hidden_act": ("silu",),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "partial_rotary_factor": (1,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "attention_multiplier": (None, 1),
    "embedding_multiplier": (None, 1),
    "residual_multiplier": (None, 1),
    "logits_scaling": (None, 1),
    "quantization_config": (None,),
}
# Settings of each rope type that this package computes as the dense model's own class does.
_ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (
        *("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"),
        *("attention_factor", "truncate"),
    ),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}
_TAKEN_OVER = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "hidden_act",
    "rms_norm_eps",
    "initializer_range",
    "attention_dropout",
    "tie_word_embeddings",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
_WITHOUT_EXPERTS = {
    "n_routed_experts": None,
    "n_shared_experts": None,
    "num_experts_per_tok": None,
    "kv_lora_rank": None,
    "q_lora_rank": None,
    "qk_nope_head_dim": None,
    "qk_rope_head_dim": None,
    "v_head_dim": None,
    "rope_interleave": False,
}


def dense_fields(config_json: dict[str, Any]) -> dict[str, Any]:
    """The fields of a `DeepseekMoeConfig` without experts that computes what a dense `config.json` says.

    Raises:
        ValueError: a field that cannot be expressed; names it and its value.
    """
    model_type = config_json.get("model_type")
    if model_type not in list(DENSE_MODELS):  # a list of names compares with anything
        raise ValueError(f"model_type={model_type!a} is not a dense model read here: {', '.join(DENSE_MODELS)}")
    row = DENSE_MODELS[model_type]
    if config_json.get("architectures") not in (None, [], [row.architecture]):
        raise ValueError(f"architectures={config_json['architectures']!a} is not ['{row.architecture}']")
    for name, values in _ONLY.items():
        if name in config_json and config_json[name] not in values:
            raise ValueError(f"{name}={config_json[name]!a} cannot be expressed; only {values[-1]!r} can")
    layer_types = config_json.get("layer_types") or []
    if any(layer_type != "full_attention" for layer_type in layer_types):
        raise ValueError(f"layer_types={sorted(set(map(str, layer_types)))} cannot be expressed, only full_attention")
    dense = row.config_class.from_dict(dict(config_json))
    return {
        **_WITHOUT_EXPERTS,
        **{name: getattr(dense, name) for name in _TAKEN_OVER},
        "head_dim": getattr(dense, "head_dim", None),
        "attention_bias": row.query_bias or bool(dense.attention_bias),
        "use_qk_norm": row.use_qk_norm,
        "rope_parameters": _rope_parameters(dense.rope_parameters),
    }


def open_dense(folder: str | os.PathLike) -> SourceCheckpoint:
    """Reads and checks a dense checkpoint folder; its `config` is a model of this family without experts.

    Raises:
        CheckpointError: one line that names file and field or tensor; nothing is converted from such a folder.
    """
    if not Path(folder).is_dir():
        raise CheckpointError(f"{folder} is not a folder; download a model first: hf download NAME --local-dir FOLDER")
    folder = Path(folder).resolve()
    config_json = read_config(folder)
    try:
        config = DeepseekMoeConfig.from_dict({**dense_fields(config_json), "model_type": "deepseek_moe"})
    except Exception as error:  # a field of the wrong type can fail anywhere in the configuration classes
        raise CheckpointError(f"{folder / CONFIG_NAME}: {' '.join(str(error).split())}") from error
    files = weight_files(folder)
    check_links(folder, files)
    file_of, entries = read_headers(folder, files)
    check_against_config(folder, config, file_of, {**entries, **_zero_biases(config_json, config)}, FP8_BLOCK)
    for name, entry in entries.items():
        if entry.dtype == FP8_DTYPE:
            raise CheckpointError(f"{folder / file_of[name]}: tensor {name} is {FP8_DTYPE}; give plain weights")
    others = other_files(folder)
    return SourceCheckpoint(
        folder=folder,
        config_json=config_json,
        file_of=file_of,
        entries=entries,
        config=config,
        block=FP8_BLOCK,
        other_files=others,
    )


def _zero_biases(config_json: dict[str, Any], config: DeepseekMoeConfig) -> dict[str, TensorEntry]:
    """Tensors that the model here has, and the checkpoint has not, because they are zero."""
    if not DENSE_MODELS[config_json["model_type"]].query_bias:
        return {}
    entry = TensorEntry("F32", (config.hidden_size,), 0, 0)
    return {f"model.layers.{layer}.{ZERO_BIAS}": entry for layer in range(config.num_hidden_layers)}


def _rope_parameters(rope: dict[str, Any]) -> dict[str, Any]:
    rope_type = rope.get("rope_type", "default")
    if rope_type not in _ROPE_FIELDS:
        raise ValueError(f"rope_type={rope_type!a} cannot be expressed, only {', '.join(_ROPE_FIELDS)}")
    known = {"rope_theta", "rope_type", "type", *_ROPE_FIELDS[rope_type]}
    for name, value in rope.items():
        if name not in known and value is not None and not (name == "partial_rotary_factor" and value == 1):
            raise ValueError(f"{name}={value!a} of the rope settings cannot be expressed with rope_type={rope_type!r}")
    return {name: value for name, value in rope.items() if name in known and value is not None}
