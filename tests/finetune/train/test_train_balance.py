"""Fine-tuning runs that balance experts and train multi-token prediction."""

import json

import pytest
import torch
from peft import PeftModel
from tiny_run import stopped_at, tiny_base, tiny_values

from modeling_deepseek_moe import DeepseekMoeForCausalLM
from modeling_deepseek_moe.finetune.errors import UserError
from modeling_deepseek_moe.finetune.model.counting import LoadCounter
from modeling_deepseek_moe.finetune.recipe.load import make_recipe
from modeling_deepseek_moe.finetune.train import one_run as train


def values(folder, base, **overrides):
    folder.mkdir(exist_ok=True)
    return tiny_values(folder, base, **overrides)


def biases(folder) -> dict[str, torch.Tensor]:
    buffers = DeepseekMoeForCausalLM.from_pretrained(folder).named_buffers()
    return {name: buffer for name, buffer in buffers if name.endswith("e_score_correction_bias")}


def test_adapters_with_a_moving_bias_end_in_a_merged_model_that_has_it(tmp_path, base):
    """Also when the run was stopped: its checkpoints hold the biases that PEFT's do not."""
    moving = {"merge": True, "bias_update_speed": 0.01}
    train.run(make_recipe(values(tmp_path / "at_once", base, **moving)))
    stopped = make_recipe(values(tmp_path / "in_two", base, **moving))
    with stopped_at(5, "checkpoint-4"):
        train.run(stopped)
    train.run(stopped)
    before = biases(base)
    at_once, in_two = (biases(tmp_path / name / "run" / "model") for name in ("at_once", "in_two"))
    for name, bias in at_once.items():
        idle = name.startswith("model.layers.3.")  # the multi-token layer, which no loss trains
        assert torch.equal(bias, before[name]) == idle, name
        assert torch.equal(bias, in_two[name]), name


def test_a_finished_run_merged_later_keeps_the_biases_of_its_last_checkpoint(tmp_path, base):
    recipe = make_recipe(values(tmp_path / "run", base, merge=True, bias_update_speed=0.01))
    train.run(recipe)
    first = biases(tmp_path / "run" / "run" / "model")
    train.run(recipe)
    assert all(torch.equal(bias, first[name]) for name, bias in biases(tmp_path / "run" / "run" / "model").items())


def test_losses_of_the_recipe_win_over_the_models_config(tmp_path, base):
    weighted = {"losses.aux_loss_alpha": 0.25, "losses.mtp_loss_weight": 0.3, "losses.aux_loss_type": "expert"}
    train.run(make_recipe(values(tmp_path / "run", base, merge=True, **weighted)))
    state = json.loads((tmp_path / "run" / "run" / "trainer_state.json").read_text())
    row = state["log_history"][1]
    # Three layers route, the multi-token layer among them; perfect balance costs 0.25 in each.
    assert row["aux_loss"] > 3 * 0.25
    assert row["mtp_loss"] > 0
    config = DeepseekMoeForCausalLM.from_pretrained(tmp_path / "run" / "run" / "model").config
    assert (config.aux_loss_alpha, config.mtp_loss_weight, config.aux_loss_type) == (0.25, 0.3, "expert")


@pytest.mark.parametrize("weight", [0.0, 0.3], ids=["idle", "trained"])
def test_lora_words_cover_the_multi_token_layer_when_a_loss_trains_it(tmp_path, base, weight):
    train.run(make_recipe(values(tmp_path / "run", base, **{"losses.mtp_loss_weight": weight})))
    model = PeftModel.from_pretrained(
        DeepseekMoeForCausalLM.from_pretrained(base), tmp_path / "run" / "run" / "adapter"
    )
    adapted = [name for name, _ in model.named_parameters() if ".layers.3." in name and "lora_" in name]
    leaves = ("self_attn.o_proj", "mlp.shared_experts.up_proj", "mlp.experts", "mlp.gate")
    assert all(any(leaf in name for name in adapted) for leaf in leaves) == bool(weight)
    assert bool(adapted) == bool(weight)


def test_a_run_of_a_model_with_experts_leaves_their_picture_and_numbers(tmp_path, base, capsys):
    train.run(make_recipe(values(tmp_path / "run", base)))
    folder = tmp_path / "run" / "run"
    assert (folder / "experts.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "experts.json").read_text())["layers"] == [1, 2, 3]
    assert "experts.png" in capsys.readouterr().out


def test_a_run_of_a_dense_model_has_no_experts_to_watch(tmp_path):
    dense = tiny_base(tmp_path / "dense", "v3", first_k_dense_replace=9, num_nextn_predict_layers=0)
    train.run(make_recipe(values(tmp_path / "run", dense, **{"lora.targets": ["attention"]})))
    assert not (tmp_path / "run" / "run" / "experts.png").exists()


def test_a_balance_field_that_the_model_cannot_have_ends_in_one_line(tmp_path, base):
    with pytest.raises(UserError, match="n_routed_experts=8 is not divisible among balance_devices=3"):
        train.run(make_recipe(values(tmp_path / "run", base, **{"losses.balance_devices": 3})))


def test_a_run_that_watches_no_experts_counts_none(tmp_path, base, monkeypatch):
    monkeypatch.setattr(LoadCounter, "attach", lambda *_: pytest.fail("counts"))
    train.run(make_recipe(values(tmp_path / "run", base, watch=False)))
    folder = tmp_path / "run" / "run"
    assert not list(folder.rglob("experts.*"))
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert not any("load_entropy" in name for row in history for name in row)
