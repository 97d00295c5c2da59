"""Models of several parts: their other parts go through `convert` byte by byte, or not at all."""

import json

import pytest
import torch
from checkpoint_folders import tensors_of
from safetensors.torch import load_file, save_file
from text_parts import PREFIX, write_kimi, write_mistral
from tiny import tiny_ids

from modeling_deepseek_moe import CheckpointError, DeepseekMoeForCausalLM
from modeling_deepseek_moe.conversion import convert
from modeling_deepseek_moe.finetune.model.lora import lora_config


@pytest.fixture
def kimi(tmp_path):
    folder = tmp_path / "kimi"
    folder.mkdir()
    return folder, write_kimi(folder)


def is_text(name: str) -> bool:
    return name.startswith(PREFIX)


def config_of(folder) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("to", ["plain", "bf16", "fp8"])
def test_other_parts_keep_their_names_and_bytes(kimi, tmp_path, to):
    folder, tensors = kimi
    convert(folder, tmp_path / "copy", to, verify=True)
    copy = tensors_of(tmp_path / "copy")
    assert {name for name in copy if not name.endswith("_scale_inv")} == tensors.keys()
    others = [name for name in tensors if not is_text(name)]
    assert others and all(torch.equal(copy[name], tensors[name]) for name in others)
    wanted = {"plain": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}[to]
    assert copy["language_model.model.layers.0.self_attn.o_proj.weight"].dtype == wanted
    written = config_of(tmp_path / "copy")
    assert written["model_type"] == "kimi_k25" and written["vision_config"] == config_of(folder)["vision_config"]
    DeepseekMoeForCausalLM.from_pretrained(tmp_path / "copy", text_only=True)


def test_both_parts_of_the_config_say_what_the_weights_are(kimi, tmp_path):
    folder, _ = kimi
    convert(folder, tmp_path / "fp8", "fp8")
    written = config_of(tmp_path / "fp8")
    assert written["dtype"] == written["text_config"]["torch_dtype"] == "bfloat16"
    assert written["quantization_config"]["modules_to_not_convert"] == ["vision_tower", "mm_projector"]
    convert(tmp_path / "fp8", tmp_path / "again", "bf16", verify=True)
    written = config_of(tmp_path / "again")
    assert "quantization_config" not in written and "quantization_config" not in written["text_config"]


def test_files_in_which_nothing_changes_are_linked(kimi, tmp_path):
    folder, _ = kimi
    report = convert(folder, tmp_path / "copy", "plain")
    assert set(report.actions.values()) == {"linked"}


def test_a_text_format_leaves_the_other_parts_out_and_says_so(kimi, tmp_path):
    folder, tensors = kimi
    report = convert(folder, tmp_path / "text", "deepseek_v3", verify=True)
    count = sum(not is_text(name) for name in tensors)
    assert any(f"left out: {count} tensors of vision_tower.*, mm_projector.*" in line for line in report.lines())
    copy = tensors_of(tmp_path / "text")
    assert copy.keys() == {name.removeprefix(PREFIX) for name in tensors if is_text(name)}
    assert config_of(tmp_path / "text")["model_type"] == "deepseek_v3"
    whole = DeepseekMoeForCausalLM.from_pretrained(folder, text_only=True)
    ids = tiny_ids(whole.config)
    with torch.no_grad():
        assert torch.equal(DeepseekMoeForCausalLM.from_pretrained(tmp_path / "text")(ids).logits, whole(ids).logits)


def test_ranks_of_deepseeks_program_hold_the_text_part_and_come_back_as_a_text_model(tmp_path):
    folder = tmp_path / "kimi"
    folder.mkdir()
    tensors = write_kimi(folder, rms_norm_eps=1e-6)  # the one that the program has
    convert(folder, tmp_path / "ranks", "deepseek-inference", mp=2, dtype="bfloat16")
    convert(tmp_path / "ranks", tmp_path / "back", "bf16")
    copy = tensors_of(tmp_path / "back")
    assert copy.keys() == {name.removeprefix(PREFIX) for name in tensors if is_text(name)}
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    assert torch.equal(copy[name], tensors[PREFIX + name].bfloat16())
    DeepseekMoeForCausalLM.from_pretrained(tmp_path / "back")


def test_an_adapter_of_the_text_part_is_merged_into_the_whole(kimi, tmp_path):
    from peft import get_peft_model

    folder, tensors = kimi
    model = DeepseekMoeForCausalLM.from_pretrained(folder, text_only=True)
    adapted = get_peft_model(model, lora_config(model, targets=["attention", "routed_experts"], r=2))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    convert(folder, tmp_path / "merged", "plain", adapter=tmp_path / "adapter", verify=True)
    merged = tensors_of(tmp_path / "merged")
    assert merged.keys() == tensors.keys()
    changed = {name for name in tensors if not torch.equal(merged[name], tensors[name])}
    assert any(".experts." in name for name in changed) and all(map(is_text, changed))
    ids = tiny_ids(model.config)
    with torch.no_grad():
        expected = adapted(ids).logits
        found = DeepseekMoeForCausalLM.from_pretrained(tmp_path / "merged", text_only=True)(ids).logits
    # A sum in another order; logits reach 4.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_a_trained_text_model_is_an_esft_adapter_of_the_whole(kimi, tmp_path):
    folder, _ = kimi
    model = DeepseekMoeForCausalLM.from_pretrained(folder, text_only=True)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3] += 1
    model.save_pretrained(tmp_path / "tuned")
    convert(tmp_path / "tuned", tmp_path / "adapter", "esft", base=folder)
    assert json.loads((tmp_path / "adapter" / "expert_cfg.json").read_text())["experts"]["1"] == [3]
    convert(folder, tmp_path / "merged", "plain", adapter=tmp_path / "adapter")
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    tuned = load_file(tmp_path / "tuned" / "model.safetensors")
    assert torch.equal(tensors_of(tmp_path / "merged")[PREFIX + name], tuned[name])


def test_a_mistral3_keeps_its_stacked_experts_and_what_it_sees_with(tmp_path):
    tensors = write_mistral(tmp_path / "whole")
    convert(tmp_path / "whole", tmp_path / "copy", "bf16", verify=True)
    copy = tensors_of(tmp_path / "copy")
    assert copy.keys() == tensors.keys()
    assert copy["vision_tower.ln_pre.weight"].dtype == torch.float32
    assert copy["language_model.model.layers.1.mlp.experts.gate_up_proj"].dtype == torch.bfloat16


def test_a_tensor_of_no_part_is_named(kimi, tmp_path):
    folder, tensors = kimi
    (folder / "model.safetensors.index.json").unlink()
    for path in folder.glob("*.safetensors"):
        path.unlink()
    save_file(tensors | {"audio_tower.proj.weight": torch.ones(2, 2)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor audio_tower\.proj\.weight belongs to no model"):
        convert(folder, tmp_path / "copy", "bf16")
