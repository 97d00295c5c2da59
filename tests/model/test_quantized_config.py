"""The saved config says that weights are quantised where they are, and only there."""

import json
import logging

import bitsandbytes
import pytest
import torch
from peft import get_peft_model
from quantisers import QUANTISERS, assert_close, logits_of, native_folder
from tiny import tiny_config, tiny_model
from torch import nn
from transformers import BitsAndBytesConfig, FineGrainedFP8Config

from modeling_deepseek_moe import DeepseekMoeForCausalLM
from modeling_deepseek_moe.finetune.model.lora import lora_config
from modeling_deepseek_moe.quantized.loading import quantize_weights
from modeling_deepseek_moe.quantized_layers import first_quantized

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return native_folder(tmp_path_factory.mktemp("native") / "model")


def four_bits(folder, **options):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, **options)
    return DeepseekMoeForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config).eval()


def saved_config(model, target) -> dict:
    model.save_pretrained(target)
    return json.loads((target / "config.json").read_text(encoding="utf-8"))


def assert_saved_plain(model, target) -> None:
    """Saved without a word of quantisation, and read again as it was."""
    assert first_quantized(model) is None
    assert "quantization_config" not in saved_config(model, target)
    again = DeepseekMoeForCausalLM.from_pretrained(target, dtype=torch.float32)
    assert not getattr(again, "is_quantized", False)
    assert torch.equal(logits_of(again), logits_of(model))


@pytest.mark.parametrize("name", ["bitsandbytes NF4", "bitsandbytes int8"])
def test_dequantised_weights_are_saved_as_plain_ones(name, folder, tmp_path):
    assert_saved_plain(QUANTISERS[name].load(DeepseekMoeForCausalLM, folder).dequantize(), tmp_path)


def test_a_four_bit_config_does_not_outlive_the_layers_it_was_made_for(folder, tmp_path, caplog):
    model = four_bits(folder)
    for name, module in list(model.named_modules()):
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            plain = nn.Linear(module.in_features, module.out_features, bias=False)
            plain.weight.data = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            model.set_submodule(name, plain)
    with caplog.at_level(logging.WARNING, logger="transformers"):
        assert_saved_plain(model, tmp_path)
    assert "is saved without quantization_config: no weight of it is quantised" in caplog.text


def test_where_every_layer_was_left_out_nothing_is_called_quantised(folder, tmp_path):
    assert_saved_plain(four_bits(folder, llm_int8_skip_modules=["model.layers", "lm_head"]), tmp_path)


def test_new_weights_under_the_config_of_a_quantised_checkpoint_are_saved_as_plain_ones(tmp_path):
    config = tiny_config("v3", num_nextn_predict_layers=0, quantization_config=FP8)
    assert_saved_plain(tiny_model(config), tmp_path)


def test_an_fp8_checkpoint_that_was_dequantised_while_loading_is_saved_as_plain(fp8, tmp_path):
    loading = FineGrainedFP8Config(dequantize=True)
    assert_saved_plain(
        DeepseekMoeForCausalLM.from_pretrained(fp8, dtype=torch.float32, quantization_config=loading).eval(),
        tmp_path,
    )


@pytest.mark.parametrize("name", ["bitsandbytes NF4", "bitsandbytes int8"])
def test_merged_adapters_leave_layers_quantised_and_the_config_true(name, folder, tmp_path):
    model = QUANTISERS[name].load(DeepseekMoeForCausalLM, folder)
    before = logits_of(model)
    adapted = get_peft_model(model, lora_config(model, ["attention"], r=4, init_lora_weights=False))
    merged = adapted.merge_and_unload()
    method = saved_config(merged, tmp_path)["quantization_config"]["quant_method"]
    assert method == "bitsandbytes" and first_quantized(merged)
    again = DeepseekMoeForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_close(logits_of(again), logits_of(merged), 1e-6, "the logits after reloading")
    assert not torch.allclose(logits_of(merged), before, atol=1e-2)


def test_an_adapter_is_saved_whatever_the_weights_below_are(folder, tmp_path):
    model = four_bits(folder)
    adapted = get_peft_model(model, lora_config(model, ["attention"], r=4))
    adapted.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert model.config.quantization_config is not None


def test_layers_quantised_by_hand_are_not_saved_under_a_config_that_hides_it(tmp_path):
    model = tiny_model(tiny_config("v3", num_nextn_predict_layers=0))
    linear = model.model.layers[0].self_attn.o_proj
    layer = bitsandbytes.nn.Linear4bit(linear.in_features, linear.out_features, False, torch.float32)
    layer.weight = bitsandbytes.nn.Params4bit(linear.weight.data, requires_grad=False, module=layer)
    model.model.layers[0].self_attn.o_proj = layer.to("cpu")
    with pytest.raises(ValueError, match="o_proj.weight is quantised, but the config has no quantization_config"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_this_packages_own_four_bits_name_themselves_and_are_not_saved(tmp_path):
    model = quantize_weights(tiny_model(tiny_config("v3", num_nextn_predict_layers=0)))
    assert first_quantized(model) and model.config.quantization_config.quant_method == "deepseek_moe_nf4"
    with pytest.raises(ValueError, match="are not saved: save the adapter"):
        model.save_pretrained(tmp_path)


def test_four_bit_layers_keep_their_gradients_after_a_pass_in_evaluation_mode(folder):
    """On a CPU with AVX512-BF16 bitsandbytes 0.50 would give gradients of 4 % of the right norm from then on."""
    model = four_bits(folder)

    def gradient():
        embedded = model.get_input_embeddings()(torch.arange(3, 12)[None]).detach().requires_grad_()
        model.train()(inputs_embeds=embedded, use_cache=False).logits.pow(2).mean().backward()
        return embedded.grad

    before = gradient()
    logits_of(model)
    torch.testing.assert_close(gradient(), before)
