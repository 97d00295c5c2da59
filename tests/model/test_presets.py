"""The released models by name."""

import pytest
import torch

from modeling_deepseek_moe import DeepseekMoeConfig, DeepseekMoeForCausalLM
from modeling_deepseek_moe.checkpoint_layout import is_mtp_tensor, parameter_counts
from modeling_deepseek_moe.presets import PRESET_OF_SIBLING, PRESETS

# FACTS 7.3: total without MTP, and active with embedding and head.
RELEASED_COUNTS = {
    "deepseek-moe-16b": (16_375_728_128, 2_828_650_496),
    "deepseek-v2-lite": (15_706_484_224, 2_661_150_208),
    "deepseek-v2": (235_741_434_880, 21_375_800_320),
    "deepseek-v3": (671_026_419_200, 37_552_282_624),
    "moonlight-16b-a3b": (15_960_110_208, 2_914_774_528),
    "kimi-k2": (1_026_408_232_448, 32_861_477_888),
    # By hand for GLM-4.7-Flash: 29,943,390,976 and 64 biases in each of 46 layers; the others as their makers round.
    "glm-4.7-flash": (29_943_393_920, 3_896_763_136),
    "glm-4.5-air": (106_852_251_264, 13_424_123_904),
    "glm-4.5": (352_797_829_024, 33_632_251_904),
    "sarvam-105b": (106_031_767_424, 12_414_898_176),
    "mistral-small-4": (118_972_826_624, 6_632_588_288),
    "deepseek-v3.2": (671_877_944_064, 38_403_807_488),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_parameter_counts_of_the_released_models_are_exact(preset):
    config = DeepseekMoeConfig.preset(preset)
    with torch.device("meta"):
        model = DeepseekMoeForCausalLM(config)
    counted = sum(tensor.numel() for name, tensor in model.state_dict().items() if not is_mtp_tensor(name, config))
    assert counted == RELEASED_COUNTS[preset][0]
    assert parameter_counts(config) == RELEASED_COUNTS[preset]


@pytest.mark.parametrize("name", PRESET_OF_SIBLING)
def test_every_sibling_has_the_shapes_of_its_preset(name):
    shapes = ("num_hidden_layers", "hidden_size", "n_routed_experts", "moe_intermediate_size", "num_attention_heads")
    sibling, model = DeepseekMoeConfig.preset(name), DeepseekMoeConfig.preset(PRESET_OF_SIBLING[name])
    assert [getattr(sibling, field) for field in shapes] == [getattr(model, field) for field in shapes]


def test_what_a_sibling_says_differently_is_kept():
    assert DeepseekMoeConfig.preset("deepseek-r1").aux_loss_alpha == 0.001
    assert DeepseekMoeConfig.preset("deepseek-v3").aux_loss_alpha == 0.0001
    assert DeepseekMoeConfig.preset("moonlight-16b-a3b-instruct").eos_token_id == 163586


def test_a_preset_accepts_a_hub_name_and_overrides():
    config = DeepseekMoeConfig.preset("deepseek-ai/DeepSeek-R1", num_hidden_layers=4, rope_scaling=None)
    assert (config.num_hidden_layers, config.hidden_size) == (4, 7168)
    assert config.rope_parameters["rope_type"] == "default"


def test_an_unknown_preset_is_an_error_that_names_the_nearest():
    with pytest.raises(ValueError, match=r"'deepseek-v2-light'; did you mean 'deepseek-v2-lite'\?.*moonlight-16b-a3b"):
        DeepseekMoeConfig.preset("deepseek-v2-light")


def test_an_unknown_field_of_a_preset_is_an_error():
    with pytest.raises(ValueError, match="no field num_layers"):
        DeepseekMoeConfig.preset("deepseek-v3", num_layers=2)
