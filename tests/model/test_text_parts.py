"""The text part of a model that also sees: Kimi-K2.5 and Mistral Small 4 as they are published."""

import json

import pytest
import torch
import transformers
from places import SIBLINGS
from safetensors.torch import load_file
from text_parts import PREFIX, kimi_json, write_kimi, write_mistral
from tiny import tiny_ids
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from modeling_deepseek_moe import CheckpointError, DeepseekMoeConfig, DeepseekMoeForCausalLM, DeepseekMoeModel


@pytest.fixture
def kimi(tmp_path):
    folder = tmp_path / "kimi"
    folder.mkdir()
    return folder, write_kimi(folder)


@torch.no_grad()
def test_the_text_part_computes_what_transformers_own_class_of_the_whole_does(kimi):
    if "kimi_k25" not in CONFIG_MAPPING_NAMES:
        pytest.skip("the installed transformers has no kimi_k25")
    folder, _ = kimi
    whole = transformers.Kimi_K25ForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").eval()
    text = DeepseekMoeForCausalLM.from_pretrained(folder, text_only=True)
    ids = tiny_ids(text.config)
    # Another order of float32 sums; logits reach 4.
    torch.testing.assert_close(text(ids).logits, whole(input_ids=ids).logits, rtol=0, atol=2e-5)


def test_what_is_saved_is_a_text_model_with_the_same_tensors(kimi, tmp_path):
    folder, tensors = kimi
    DeepseekMoeForCausalLM.from_pretrained(folder, text_only=True).save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    text = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
    assert saved.keys() == text.keys() and all(torch.equal(saved[name], text[name]) for name in text)
    written = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert written["model_type"] == "deepseek_moe" and "vision_config" not in written
    again = DeepseekMoeForCausalLM.from_pretrained(tmp_path / "saved")
    ids = tiny_ids(again.config)
    assert torch.equal(again(ids).logits, DeepseekMoeForCausalLM.from_pretrained(folder, text_only=True)(ids).logits)


@pytest.mark.parametrize("model_class", [DeepseekMoeForCausalLM, DeepseekMoeModel])
def test_other_parts_are_never_dropped_unasked(kimi, model_class):
    folder, tensors = kimi
    with pytest.raises(CheckpointError) as error:
        model_class.from_pretrained(folder)
    seen = sum(name.startswith("vision_tower.") for name in tensors)
    assert f"{seen} tensors vision_tower.*" in str(error.value) and "6 tensors mm_projector.*" in str(error.value)
    assert "text_only=True" in str(error.value) and "\n" not in str(error.value)
    model_class.from_pretrained(folder, text_only=True)


def test_a_state_dict_of_several_parts_is_refused_and_taken_alike(kimi):
    folder, tensors = kimi
    config = DeepseekMoeConfig.from_pretrained(folder)
    with pytest.raises(CheckpointError, match="holds more than a text model"):
        DeepseekMoeForCausalLM.from_pretrained(None, config=config, state_dict=dict(tensors))
    model = DeepseekMoeForCausalLM.from_pretrained(None, config=config, state_dict=dict(tensors), text_only=True)
    assert torch.equal(model.lm_head.weight, tensors["language_model.lm_head.weight"])


def test_a_missing_tensor_of_the_text_part_is_named(kimi):
    folder, tensors = kimi
    del tensors["language_model.model.norm.weight"]
    config = DeepseekMoeConfig.from_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"1 missing \(model\.norm\.weight\)"):
        DeepseekMoeForCausalLM.from_pretrained(None, config=config, state_dict=tensors, text_only=True)


def test_a_model_of_text_alone_is_loaded_with_text_only_too(tmp_path):
    folder = SIBLINGS / "glm4_moe_lite_style"
    model = DeepseekMoeForCausalLM.from_pretrained(folder, text_only=True)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()


@torch.no_grad()
def test_the_text_part_of_a_mistral3_is_the_mistral4_that_it_names(tmp_path):
    write_mistral(tmp_path / "whole")
    expected = load_file(SIBLINGS / "mistral4_style" / "expected.safetensors")
    model = DeepseekMoeForCausalLM.from_pretrained(tmp_path / "whole", text_only=True)
    torch.testing.assert_close(model(expected["input_ids"]).logits, expected["logits"], rtol=0, atol=2e-5)
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["model_type"] == "mistral4"
    original = load_file(SIBLINGS / "mistral4_style" / "model.safetensors")
    assert load_file(tmp_path / "saved" / "model.safetensors").keys() == original.keys()


def test_the_config_takes_from_around_the_text_part_what_that_leaves_out():
    around = kimi_json() | {"dtype": "bfloat16"}
    del around["text_config"]["torch_dtype"]
    config = DeepseekMoeConfig.from_dict(around)
    assert config.dtype == torch.bfloat16 and config.rms_norm_eps == 1e-5 and config.num_nextn_predict_layers == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text_config": None}, "text_config=None of a kimi_k25 is not an object"),
        ({"text_config": {"model_type": "llama"}}, "text_config.model_type='llama' of a kimi_k25 is not 'kimi_k2' or"),
        ({"model_type": "mistral3"}, "text_config.model_type='kimi_k2' of a mistral3 is not 'mistral4'"),
    ],
    ids=["no text part", "another text model", "another wrapper"],
)
def test_a_text_part_that_is_none_of_ours_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        DeepseekMoeConfig.from_dict(kimi_json() | fields)
