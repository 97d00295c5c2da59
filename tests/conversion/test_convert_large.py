"""Checkpoints of DeepSeek-V3's size: what they hold, planned from their headers alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modeling_deepseek_moe import DeepseekMoeConfig
from modeling_deepseek_moe.checkpoint_files import INDEX_NAME
from modeling_deepseek_moe.checkpoint_layout import expected_tensors
from modeling_deepseek_moe.presets import PRESETS

TENSORS, BYTES = 91_991, 688_574_839_360  # as published (FACTS 3.4)
SHARD_BYTES = 4_300_000_000
PLAN = """
import sys, time
from pathlib import Path
from modeling_deepseek_moe.conversion import convert
start = time.process_time()
report = convert(sys.argv[1], sys.argv[2], "bf16", dry_run=True)
seconds = time.process_time() - start
status = Path("/proc/self/status")  # Linux; getrusage would count the parent's memory in
peak = status.read_text().split("VmHWM:")[1].split()[0] if status.exists() else 0
print(seconds, int(peak) * 1024)
print(report.plan.tensor_count, sum(spec.size for shard in report.plan.shards for spec in shard.tensors()))
"""


@pytest.fixture(scope="module")
def published() -> dict:
    return expected_tensors(DeepseekMoeConfig.preset("deepseek-v3"), fp8=True)


def bytes_of(tensors: dict) -> int:
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in tensors.values())


def test_deepseek_v3_in_fp8_has_the_tensors_and_bytes_that_were_published(published):
    assert len(published) == TENSORS
    assert bytes_of(published) == BYTES


def test_which_tensors_are_fp8_is_what_the_published_checkpoint_says(published):
    """FACTS 3.4: 576 rows are five blocks, the last one half."""
    layer = "model.layers.61"
    name = f"{layer}.self_attn.kv_a_proj_with_mqa.weight"
    assert published[name] == ((576, 7168), torch.float8_e4m3fn)
    assert published[f"{name}_scale_inv"] == ((5, 56), torch.float32)
    plain = {name for name, (_, dtype) in published.items() if dtype == torch.bfloat16 and name.startswith(layer)}
    others = ("input_layernorm", "post_attention_layernorm", "enorm", "hnorm", "shared_head.norm", "shared_head.head")
    others += ("self_attn.q_a_layernorm", "self_attn.kv_a_layernorm", "mlp.gate", "eh_proj", "embed_tokens")
    assert plain == {f"{layer}.{name}.weight" for name in others}


def sparse_folder(folder: Path, tensors: dict, config_json: dict) -> Path:
    """A checkpoint of zeros that takes no space on the disk: only its headers are there."""
    names = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3"}
    headers: list[dict] = [{}]
    end = 0
    for name, (shape, dtype) in tensors.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        if end + size > SHARD_BYTES:
            headers.append({})
            end = 0
        headers[-1][name] = {"dtype": names[dtype], "shape": shape, "data_offsets": [end, end + size]}
        end += size
    folder.mkdir()
    weight_map = {}
    for i, header in enumerate(headers):
        file, text = f"model-{i + 1:05}-of-{len(headers):06}.safetensors", json.dumps(header).encode()
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + max(entry["data_offsets"][1] for entry in header.values()))
        weight_map |= dict.fromkeys(header, file)
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config_json))
    return folder


@pytest.mark.slow
def test_a_dry_run_of_deepseek_v3_takes_less_than_ten_seconds_and_a_gigabyte(published, tmp_path):
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    folder = sparse_folder(tmp_path / "v3", published, {**PRESETS["deepseek-v3"], "quantization_config": quantization})
    command = [sys.executable, "-c", PLAN, folder, tmp_path / "target"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, memory, tensors, bytes_ = map(float, done.stdout.split())
    assert seconds < 10 and memory < 1e9
    assert (tensors, bytes_) == (46_183, bytes_of(expected_tensors(DeepseekMoeConfig.preset("deepseek-v3"))))
    assert not (tmp_path / "target").exists()
