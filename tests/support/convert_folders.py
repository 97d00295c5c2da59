"""Checkpoint folders for the conversion tests: FP8 as DeepSeek publishes it, sharded, blocks cut off at the edges."""

import json
from pathlib import Path

import torch
from checkpoint_folders import tensors_of
from safetensors.torch import save_file
from tiny import JSON_OF_LINEAGE, tiny_ids, tiny_model

from modeling_deepseek_moe import DeepseekMoeConfig, DeepseekMoeForCausalLM
from modeling_deepseek_moe.checkpoint_files import INDEX_NAME
from modeling_deepseek_moe.checkpoint_layout import is_fp8_weight

QUANTIZATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}
# Several blocks, most of them cut off: 192 = 128 + 64 rows, as 576 = 4 * 128 + 64 in DeepSeek-V3.
_RAGGED = {
    "hidden_size": 192,
    "intermediate_size": 200,
    "moe_intermediate_size": 144,
    "kv_lora_rank": 136,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 2,
    "num_hidden_layers": 2,
    "torch_dtype": "bfloat16",
}


def ragged_json(lineage: str = "v3", **fields) -> dict:
    """A tiny config.json with weights of several blocks."""
    groups = ("n_group", "topk_group")
    sizes = {name: value for name, value in _RAGGED.items() if lineage in ("v2", "v3") or name not in groups}
    if lineage == "v1":
        del sizes["kv_lora_rank"]
    return {**JSON_OF_LINEAGE[lineage], **sizes, **fields}


def bf16_tensors(config_json: dict, folder: Path) -> dict[str, torch.Tensor]:
    """The tensors that a random model of that json saves in bfloat16."""
    tiny_model(DeepseekMoeConfig.from_dict(dict(config_json))).bfloat16().save_pretrained(folder)
    return tensors_of(folder)


def random_fp8(tensors: dict[str, torch.Tensor], scale_dtype=torch.float32) -> dict[str, torch.Tensor]:
    """The same checkpoint with random FP8 numbers and scales; the test's own code, no rounding of a weight."""
    generator = torch.Generator().manual_seed(0)
    result = {}
    for name, tensor in tensors.items():
        if not is_fp8_weight(name):
            result[name] = tensor
            continue
        rows, columns = tensor.shape
        values = torch.randn(rows, columns, generator=generator) * 100
        result[name] = values.to(torch.float8_e4m3fn)
        shape = ((rows + 127) // 128, (columns + 127) // 128)
        exponents = torch.randint(-14, -8, shape, generator=generator).float()
        mantissas = 1 + torch.rand(shape, generator=generator) if scale_dtype == torch.float32 else torch.ones(shape)
        result[f"{name}_scale_inv"] = (mantissas * exponents.exp2()).to(scale_dtype)
    return result


def plainly_dequantized(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What `random_fp8` means, one block at a time (FACTS 3.4)."""
    result = {name: tensor for name, tensor in tensors.items() if not name.endswith("_scale_inv")}
    for name, tensor in result.items():
        if tensor.dtype == torch.float8_e4m3fn:
            values, scale = tensor.float(), tensors[f"{name}_scale_inv"].float()
            for i in range(scale.shape[0]):
                for j in range(scale.shape[1]):
                    values[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128] *= scale[i, j]
            result[name] = values.bfloat16()
    return result


def sharded(folder: Path, config_json: dict, tensors: dict[str, torch.Tensor], shards: int = 3) -> Path:
    """A folder with an index; tensors go round the files, so that scales are not where their weights are."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_json))
    (folder / "tokenizer.json").write_text('{"model": "a tokenizer"}')
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[i::shards])
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def fp8_folder(folder: Path, scale_dtype=torch.float32, **fields) -> Path:
    """A V3-style FP8 checkpoint in three files, scales apart from their weights."""
    config_json = ragged_json(**fields)
    tensors = random_fp8(bf16_tensors(config_json, folder.with_name(f"{folder.name}-bf16")), scale_dtype)
    return sharded(folder, {**config_json, "quantization_config": QUANTIZATION}, tensors)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def json_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def logits_of(folder: Path, model_class=DeepseekMoeForCausalLM, **options) -> torch.Tensor:
    model = model_class.from_pretrained(folder, **options)
    with torch.no_grad():
        return model(tiny_ids(model.config)).logits
