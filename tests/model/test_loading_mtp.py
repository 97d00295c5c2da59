"""Checkpoints with multi-token prediction modules: kept, absent, or broken."""

import json
import logging

import pytest
import torch
from checkpoint_folders import assert_bit_equal, tensors_of, written
from tiny import JSON_OF_LINEAGE, tiny_model, v3_config

from modeling_deepseek_moe import CheckpointError, DeepseekMoeForCausalLM


@pytest.mark.parametrize("modules", [1, 2])
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}], ids=["one file", "shards"])
def test_t15_mtp_modules_are_kept_under_the_layer_numbers_behind_the_main_layers(modules, options, tmp_path):
    """FACTS T15 and T20: layers 3 and 4 of a 3-layer model, with their copies of embedding and head."""
    model = tiny_model(v3_config(num_nextn_predict_layers=modules))
    model.save_pretrained(tmp_path / "first", **options)
    first = tensors_of(tmp_path / "first")
    for layer in range(3, 3 + modules):
        prefix = f"model.layers.{layer}"
        assert first[f"{prefix}.eh_proj.weight"].shape == (32, 64)
        assert f"{prefix}.mlp.experts.7.down_proj.weight" in first
        assert torch.equal(first[f"{prefix}.embed_tokens.weight"], first["model.embed_tokens.weight"])
        assert torch.equal(first[f"{prefix}.shared_head.head.weight"], first["lm_head.weight"])
    assert not any(name.startswith(f"model.layers.{3 + modules}.") for name in first)
    again, info = DeepseekMoeForCausalLM.from_pretrained(tmp_path / "first", output_loading_info=True)
    assert not any(info.values()), info
    assert_bit_equal(again.state_dict(), model.state_dict())
    again.save_pretrained(tmp_path / "second", **options)
    assert_bit_equal(tensors_of(tmp_path / "second"), first)


def test_mtp_modules_without_their_copies_load_and_get_them_back(v3_tensors, tmp_path):
    copies = ("layers.3.embed_tokens.weight", "layers.3.shared_head.head.weight")
    kept = {name: tensor for name, tensor in v3_tensors.items() if not name.endswith(copies)}
    assert len(kept) == len(v3_tensors) - 2
    model = DeepseekMoeForCausalLM.from_pretrained(written(tmp_path / "in", JSON_OF_LINEAGE["v3"], kept))
    model.save_pretrained(tmp_path / "out")
    assert_bit_equal(tensors_of(tmp_path / "out"), v3_tensors)


def test_an_mtp_copy_that_is_not_the_main_models_is_said_to_be_replaced(v3_tensors, tmp_path, caplog):
    name = "model.layers.3.embed_tokens.weight"
    folder = written(tmp_path, JSON_OF_LINEAGE["v3"], {**v3_tensors, name: v3_tensors[name] + 1})
    DeepseekMoeForCausalLM.from_pretrained(folder)
    assert [record.levelno for record in caplog.records if f"{name} differs" in record.message] == [logging.WARNING]


def test_announced_but_absent_mtp_modules_are_left_out_said_once_and_not_announced_again(v3_tensors, tmp_path, caplog):
    kept = {name: tensor for name, tensor in v3_tensors.items() if not name.startswith("model.layers.3.")}
    folder = written(tmp_path / "in", JSON_OF_LINEAGE["v3"], kept)
    model, info = DeepseekMoeForCausalLM.from_pretrained(folder, output_loading_info=True)
    DeepseekMoeForCausalLM.from_pretrained(folder)
    said = [record.message for record in caplog.records if "num_nextn_predict_layers=1" in record.message]
    assert len(said) == 1 and str(folder) in said[0]
    assert not any(info.values()), info
    assert len(model.model.layers) == 3
    model.save_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert_bit_equal(tensors_of(tmp_path / "out"), kept)


def test_leftover_copies_alone_are_no_mtp_module(v3_tensors, tmp_path):
    """A derivative that dropped the module but kept its embedding and head."""
    copies = ("layers.3.embed_tokens.weight", "layers.3.shared_head.head.weight")
    kept = {
        name: tensor
        for name, tensor in v3_tensors.items()
        if not name.startswith("model.layers.3.") or name.endswith(copies)
    }
    model = DeepseekMoeForCausalLM.from_pretrained(written(tmp_path, JSON_OF_LINEAGE["v3"], kept))
    assert model.config.num_nextn_predict_layers == 0


def test_an_mtp_module_of_which_only_a_part_is_there_is_an_error(v3_tensors, tmp_path):
    lost = ("model.layers.3.eh_proj.weight", "model.layers.3.mlp.gate.weight")
    kept = {name: tensor for name, tensor in v3_tensors.items() if name not in lost}
    with pytest.raises(CheckpointError, match=r"2 missing \(.*layers\.3\.mlp\.gate\.weight, .*eh_proj\.weight\)"):
        DeepseekMoeForCausalLM.from_pretrained(written(tmp_path, JSON_OF_LINEAGE["v3"], kept))


def test_mtp_modules_that_no_loss_trains_are_frozen(v3_folder):
    frozen = DeepseekMoeForCausalLM.from_pretrained(v3_folder)
    trained = DeepseekMoeForCausalLM.from_pretrained(v3_folder, mtp_loss_weight=0.3)
    assert not any(parameter.requires_grad for parameter in frozen.model.layers[3].parameters())
    assert all(parameter.requires_grad for parameter in trained.parameters())


def test_load_state_dict_takes_a_saved_checkpoint_with_its_mtp_copies(tmp_path):
    config = v3_config(num_nextn_predict_layers=1)
    saved, other = tiny_model(config, seed=0), tiny_model(config, seed=1)
    saved.save_pretrained(tmp_path)
    result = other.load_state_dict(tensors_of(tmp_path), strict=True)
    assert not result.missing_keys and not result.unexpected_keys
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in saved.state_dict().items())
