"""What a complete checkpoint holds, told from the config alone."""

from pathlib import Path

import pytest
import torch
from places import GOLDEN_FOLDERS
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import CONFIG_OF_LINEAGE, tiny_config, tiny_model, v1_config, v3_config

from modeling_deepseek_moe import DeepseekMoeConfig
from modeling_deepseek_moe.checkpoint_files import check_folder, check_tensors, read_header
from modeling_deepseek_moe.checkpoint_layout import expected_tensors, is_mtp_tensor, is_redundant, parameter_counts


def specs(path: Path) -> dict:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("folder", GOLDEN_FOLDERS, ids=lambda folder: folder.name)
def test_the_expected_tensors_are_those_of_deepseeks_own_files(folder):
    config = DeepseekMoeConfig.from_pretrained(folder)
    config.num_nextn_predict_layers = 0  # v3_style announces an MTP module that its file does not hold
    assert expected_tensors(config) == specs(folder / "model.safetensors")


@pytest.mark.parametrize(
    "config",
    [
        *(tiny_config(lineage) for lineage in CONFIG_OF_LINEAGE),
        v3_config(num_nextn_predict_layers=2, moe_layer_freq=2, attention_bias=True, dtype="bfloat16"),
        v1_config(attention_bias=True, tie_word_embeddings=True, n_shared_experts=None),
        v1_config(n_routed_experts=None, num_experts_per_tok=None),
    ],
    ids=[*CONFIG_OF_LINEAGE, "two MTP modules, biases, bfloat16", "tied, unshared", "dense"],
)
def test_the_expected_tensors_are_those_a_model_saves(config, tmp_path):
    expected = expected_tensors(config)
    tiny_model(config).to(config.dtype).save_pretrained(tmp_path)
    assert specs(tmp_path / "model.safetensors") == expected


def test_the_expected_tensors_are_the_same_after_a_save(tmp_path):
    """Saving leaves the dtype's name, a string, in the config."""
    model = tiny_model(v3_config())
    expected = expected_tensors(model.config)
    model.save_pretrained(tmp_path)
    assert expected_tensors(model.config) == expected


def test_deepseek_v3_has_46183_tensors():
    """61 layers and one MTP module, as in the published index without its FP8 scales."""
    config = DeepseekMoeConfig.preset("deepseek-v3")
    expected = expected_tensors(config)
    assert len(expected) == 46183
    assert expected["model.layers.60.mlp.experts.255.down_proj.weight"] == ((7168, 2048), torch.bfloat16)
    assert expected["model.layers.3.mlp.gate.e_score_correction_bias"] == ((256,), torch.float32)
    assert expected["model.layers.61.eh_proj.weight"] == ((7168, 14336), torch.bfloat16)
    assert expected["model.layers.61.shared_head.head.weight"] == ((129280, 7168), torch.bfloat16)


def test_the_shared_experts_are_one_mlp_as_wide_as_all_of_them():
    """FACTS T17."""
    expected = expected_tensors(v3_config(n_shared_experts=3))
    shared = {name: shape for name, (shape, _) in expected.items() if "layers.1.mlp.shared_experts" in name}
    prefix = "model.layers.1.mlp.shared_experts"
    assert shared == {
        f"{prefix}.gate_proj.weight": (48, 32),
        f"{prefix}.up_proj.weight": (48, 32),
        f"{prefix}.down_proj.weight": (32, 48),
    }


def test_active_parameters_count_the_chosen_experts_only():
    config = v3_config(num_nextn_predict_layers=0)
    total, active = parameter_counts(config)
    expert, layers = 3 * config.hidden_size * config.moe_intermediate_size, 2
    idle = layers * (config.n_routed_experts - config.num_experts_per_tok) * expert
    assert total - active == idle + layers * config.n_routed_experts


@pytest.mark.parametrize(
    ("name", "is_mtp"),
    [
        ("model.layers.2.mlp.gate.weight", False),
        ("model.layers.3.mlp.gate.weight", True),
        ("layers.3.enorm.weight", True),
        ("layers.30", True),
        ("model.embed_tokens.weight", False),
        ("model.layers.weight", False),
    ],
)
def test_mtp_tensors_are_known_by_a_layer_index_behind_the_main_layers(name, is_mtp):
    """FACTS T15: num_hidden_layers decides, not 61."""
    assert is_mtp_tensor(name, v3_config()) is is_mtp


@pytest.mark.parametrize(
    ("name", "redundant"),
    [
        ("model.layers.1.self_attn.rotary_emb.inv_freq", True),
        ("model.layers.3.embed_tokens.weight", True),
        ("layers.3.shared_head.head.weight", True),
        ("model.layers.3.shared_head.norm.weight", False),
        ("model.embed_tokens.weight", False),
        ("lm_head.weight", False),
    ],
)
def test_only_rotary_tables_and_mtp_copies_are_redundant(name, redundant):
    """FACTS T20."""
    assert is_redundant(name) is redundant


@pytest.mark.parametrize("folder", GOLDEN_FOLDERS[:3], ids=lambda folder: folder.name)
def test_a_header_is_read_as_safetensors_itself_reads_it(folder):
    path = folder / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert read_header(path) == shapes


def test_a_folder_with_one_file_needs_no_index():
    check_folder(GOLDEN_FOLDERS[0])


@pytest.mark.parametrize("stacked", [False, True], ids=["per expert", "stacked"])
@pytest.mark.parametrize("prefix", ["model.", ""], ids=["with head", "base only"])
def test_complete_tensors_pass_in_either_layout_and_with_or_without_prefix(stacked, prefix):
    config = v3_config()
    if stacked:
        shapes = {name: tuple(tensor.shape) for name, tensor in tiny_model(config).state_dict().items()}
    else:
        shapes = {name: shape for name, (shape, _) in expected_tensors(config).items()}
    if not prefix:
        shapes = {name.removeprefix("model."): shape for name, shape in shapes.items() if name != "lm_head.weight"}
    assert check_tensors(config, shapes, with_head=bool(prefix), source="test")
