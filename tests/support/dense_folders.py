"""Tiny dense checkpoints as transformers saves them, and experts made of them."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from modeling_deepseek_moe.conversion import ConversionReport, UpcycleOptions, convert
from modeling_deepseek_moe.finetune.data.plain_rows import read_rows

_SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_YARN = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 16}
_YARN |= {"attention_factor": 1.3, "truncate": False}
DENSE = {
    "llama": (LlamaConfig, {}),
    "llama, tied, biases, llama3 rope": (
        LlamaConfig,
        {"tie_word_embeddings": True, "attention_bias": True, "rope_parameters": _LLAMA3},
    ),
    "llama, linear rope, wide heads": (
        LlamaConfig,
        {"head_dim": 12, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "qwen2, tied": (Qwen2Config, {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "qwen2, yarn": (Qwen2Config, {"rope_parameters": _YARN}),
    "qwen3": (Qwen3Config, {"head_dim": 24, "tie_word_embeddings": True}),
    "qwen3, dynamic rope": (
        Qwen3Config,
        {"head_dim": 8, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
    ),
}


def dense_model(kind: str = "llama", **fields):
    """A random model of a key of `DENSE` in eval mode; norms and biases are random too, so that they matter."""
    config_class, own = DENSE[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config_class(**{**_SIZES, **own, **fields}))
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.data.normal_(1.0, 0.3)
            elif name.endswith("bias"):
                parameter.data.normal_(std=0.3)
    return model.eval()


def dense_folder(folder: Path, kind: str = "llama", dtype=torch.float32, **fields) -> Path:
    """A saved `dense_model` in several files, so that parts of a layer lie apart."""
    dense_model(kind, **fields).to(dtype).save_pretrained(folder, max_shard_size="20KB")
    return folder


def upcycled(source: Path, target: Path, data: Path | None = None, **arguments) -> ConversionReport:
    """Eight routed experts, of which three serve a token, and two shared ones, unless `upcycle` says otherwise.

    `data` is a file, as for the command.
    """
    if data is not None:
        arguments["data"] = read_rows(source, data)
    return convert(source, target, "upcycle", **{"upcycle": UpcycleOptions(8, 2, 3), **arguments})
