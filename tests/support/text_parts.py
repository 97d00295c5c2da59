"""Tiny models of several parts, named as Kimi-K2.5 and Mistral Small 4 are published: a text part among others."""

import json
from pathlib import Path

import torch
from places import SIBLINGS
from safetensors.torch import load_file, save_file
from tiny import JSON_OF_LINEAGE, tiny_model

from modeling_deepseek_moe import DeepseekMoeConfig
from modeling_deepseek_moe.checkpoint_files import INDEX_NAME

PREFIX = "language_model."
_WIDTH, _PATCH = 16, 2
# Keys of the released file and those that transformers' own class reads.
_VISION = {
    "vt_hidden_size": _WIDTH,
    "vt_num_hidden_layers": 1,
    "hidden_size": _WIDTH,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "patch_size": _PATCH,
    "pos_emb_height": 4,
    "pos_emb_width": 4,
    "pos_emb_time": 2,
    "merge_kernel_size": [2, 2],
}


def kimi_json(**text) -> dict:
    """A `config.json` as Kimi-K2.5 has it, around the tiny Kimi-K2; `text` are fields of its text part."""
    return {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "auto_map": {"AutoConfig": "configuration_kimi_k25.KimiK25Config"},
        "model_type": "kimi_k25",
        "dtype": "float32",
        "tie_word_embeddings": False,
        "media_placeholder_token_id": 90,
        "projection_hidden_size": _WIDTH,
        "text_config": {**JSON_OF_LINEAGE["kimi"], "num_key_value_heads": 4, "rms_norm_eps": 1e-5, **text},
        "vision_config": _VISION,
    }


def write_kimi(folder: Path, **text) -> dict[str, torch.Tensor]:
    """A tiny Kimi-K2.5 in two files; returns its tensors."""
    config_json = kimi_json(**text)
    model = tiny_model(DeepseekMoeConfig.from_dict(dict(config_json["text_config"])))
    model.save_pretrained(folder / "text")
    tensors = {PREFIX + name: tensor for name, tensor in load_file(folder / "text" / "model.safetensors").items()}
    hidden = model.config.hidden_size
    return _write(folder, config_json, tensors, _vision(hidden))


def write_mistral(folder: Path) -> dict[str, torch.Tensor]:
    """The golden Mistral 4 as the text part of a `mistral3`, as Mistral Small 4 is published."""
    text = json.loads((SIBLINGS / "mistral4_style" / "config.json").read_text())
    config_json = {"model_type": "mistral3", "dtype": "float32", "text_config": text, "vision_config": {}}
    tensors = load_file(SIBLINGS / "mistral4_style" / "model.safetensors")
    other = {"vision_tower.ln_pre.weight": torch.ones(8), "multi_modal_projector.linear_1.weight": torch.ones(8, 8)}
    return _write(folder, config_json, {PREFIX + name: tensor for name, tensor in tensors.items()}, other)


def _write(folder: Path, config_json: dict, text: dict, other: dict) -> dict[str, torch.Tensor]:
    folder.mkdir(exist_ok=True)
    # As published: the head and some of the other parts share a file.
    head = {name: text.pop(name) for name in [name for name in text if "lm_head" in name]}
    files = {"model-00001-of-00002.safetensors": text, "model-00002-of-00002.safetensors": head | other}
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    for file, tensors in files.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config_json))
    return text | head | other


def _vision(hidden: int) -> dict[str, torch.Tensor]:
    generator, block = torch.Generator().manual_seed(1), "vision_tower.encoder.blocks.0"
    merged, inner = 4 * _WIDTH, _VISION["intermediate_size"]
    shapes = {
        "mm_projector.pre_norm": (_WIDTH,),
        "mm_projector.proj.0": (merged, merged),
        "mm_projector.proj.2": (hidden, merged),
        f"{block}.mlp.fc0": (inner, _WIDTH),
        f"{block}.mlp.fc1": (_WIDTH, inner),
        f"{block}.norm0": (_WIDTH,),
        f"{block}.norm1": (_WIDTH,),
        f"{block}.wo": (_WIDTH, _WIDTH),
        f"{block}.wqkv": (3 * _WIDTH, _WIDTH),
        "vision_tower.encoder.final_layernorm": (_WIDTH,),
        "vision_tower.patch_embed.proj": (_WIDTH, 3, _PATCH, _PATCH),
    }
    tensors = {"vision_tower.patch_embed.pos_emb.weight": torch.randn(4, 4, _WIDTH, generator=generator)}
    for name, shape in shapes.items():
        tensors[f"{name}.weight"] = torch.randn(shape, generator=generator)
        tensors[f"{name}.bias"] = torch.randn(shape[0], generator=generator)
    return tensors
