"""Adapter folders for the conversion tests, as stock PEFT saves them on transformers' own DeepSeek-V3."""

import json
from pathlib import Path

import torch
from adapted_pair import EXPERTS, randomize
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import tiny_model, v3_config
from transformers import DeepseekV3ForCausalLM

from modeling_deepseek_moe.conversion import convert

ATTENTION = ["q_b_proj", "kv_a_proj_with_mqa", "o_proj"]
# The stacked experts of the first layer that has them.
STACK = "base_model.model.model.layers.1.mlp.experts"


def native_base(folder: Path) -> Path:
    """A DeepSeek-V3 checkpoint in float32 with MTP tensors, which transformers' own class leaves alone."""
    tiny_model(v3_config()).save_pretrained(folder / "saved")
    convert(folder / "saved", folder / "native", "deepseek_v3")
    return folder / "native"


def save_adapter(base: Path, folder: Path, dtype=torch.float32, **options) -> Path:
    """A random adapter of stock PEFT."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "target_parameters": EXPERTS, **options}
    model = get_peft_model(DeepseekV3ForCausalLM.from_pretrained(base, dtype=dtype), LoraConfig(**settings))
    randomize(model, seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.5)
    model.save_pretrained(folder)
    return folder


def json_of(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def edit_json(folder: Path, **fields) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(json_of(folder) | fields))


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
