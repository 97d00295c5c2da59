"""Layouts of several GPUs: what ranks hold, against transformers' sharding on torch's fake backend, and advice."""

import json

import pytest
import torch
from places import ROOT
from tiny import tiny_config
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers.distributed import fsdp as fsdp_of_transformers
from typer.testing import CliRunner

from modeling_deepseek_moe import DeepseekMoeConfig
from modeling_deepseek_moe.cli.main import app
from modeling_deepseek_moe.finetune.errors import UserError
from modeling_deepseek_moe.finetune.plan.fit import find_config, plan_recipe
from modeling_deepseek_moe.finetune.plan.layout_report import TABLE_MODELS, layout_facts, layout_table
from modeling_deepseek_moe.finetune.plan.layouts import candidates, need_of_rank, plan_layouts, recommended
from modeling_deepseek_moe.finetune.plan.memory import MemoryPlan
from modeling_deepseek_moe.finetune.plan.model import meta_model
from modeling_deepseek_moe.finetune.plan.ranks import Layout, spread_by, spreads_of
from modeling_deepseek_moe.finetune.recipe.load import make_recipe

README = ROOT / "finetune" / "README.md"
COUNTS = (8, 64, 256, 2048)
GIB = 2**30


def recipe_of(**values):
    return make_recipe({"model": "m", "data": "d", "output_dir": "o", "dtype": "bfloat16", **values})


def v3(*overrides):
    return find_config("deepseek-v3"), plan_recipe("full", "deepseek-v3", ["dtype=bfloat16", *overrides])


def call(*arguments):
    return CliRunner().invoke(app, ["plan", *map(str, arguments)], env={"COLUMNS": "200"})


LAYOUTS = [
    Layout(shard=4),
    Layout(shard=6, ep=2),
    Layout(shard=12, ep=4),
    Layout(shard=16, ep=2, inside_experts=True),
    Layout(shard=2, replicate=2, ep=2),
    Layout(shard=3, tp=2),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda each: each.name)
@pytest.mark.parametrize("lora", [[], ["all"]], ids=["full", "LoRA"])
def test_every_rank_holds_what_transformers_would_give_it(layout, lora):
    config = tiny_config("v3", num_hidden_layers=2, n_routed_experts=8)
    recipe = recipe_of(**{"lora.targets": lora, "lora.r": 2} if lora else {})
    if lora and layout.tp > 1:
        with pytest.raises(ValueError, match="tp_size=2"):
            spreads_of(config, recipe, layout)
        return
    spreads = spreads_of(config, recipe, layout)
    for rank in range(layout.ranks):
        with spread_by(layout, rank) as spread:
            _, model, _ = meta_model(config, recipe, spread)
            tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
            held = {name: (t.to_local() if isinstance(t, DTensor) else t).numel() for name, t in tensors.items()}
        assert {each.whole.name: each.numel[rank] for each in spreads} == held


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda each: each.name)
def test_ranks_together_hold_the_model_as_often_as_there_are_copies(layout):
    for each in spreads_of(tiny_config("v3"), recipe_of(), layout):
        assert sum(each.numel) == each.copies * torch.Size(each.whole.shape).numel()
        assert layout.ranks % each.copies == 0


@pytest.mark.parametrize("ep", [8, 64])
def test_v3_takes_21_gb_on_each_of_64_ranks(ep):
    config, recipe = v3()
    layout = Layout(shard=64, ep=ep)
    spreads = spreads_of(config, recipe, layout)
    on_ranks = [sum(each.bytes_on(rank) for each in spreads) for rank in range(64)]
    assert max(on_ranks) == pytest.approx(21.33e9, rel=0.01)  # PARALLEL.md's prototype
    cut = [each for each in spreads if each.copies == 1]
    model = sum(p.nbytes for p in MemoryPlan(config, recipe).parameters)
    copied = sum(each.whole.nbytes for each in spreads if each.copies > 1)  # selection biases
    assert sum(each.bytes_on(rank) for each in cut for rank in range(64)) == model - copied
    assert copied < 1e6


def test_of_more_ranks_than_experts_none_is_left_empty_if_they_are_cut_inside():
    config, recipe = v3()
    plain, inside = (
        need_of_rank(config, recipe, Layout(shard=2048, ep=64, inside_experts=each)) for each in (False, True)
    )
    assert plain.weights == pytest.approx(5.22e9, rel=0.01)
    assert inside.weights == pytest.approx(0.67e9, rel=0.01)
    assert Layout(shard=2048, ep=256, inside_experts=True) in candidates(config, 2048)
    assert not any(each.inside_experts for each in candidates(config, 256))


def test_all_to_all_carries_each_token_to_its_experts_and_back_forward_and_backward():
    config, recipe = v3("gradient_checkpointing=false")
    need = need_of_rank(config, recipe, Layout(shard=64, ep=64))
    exchanged = next(each for each in need.traffic if each.kind == "all-to-all")
    moe_layers, tokens = 58, recipe.max_length
    assert exchanged.payload == 4 * moe_layers * tokens * 8 * 7168 * 2
    assert exchanged.sent == exchanged.payload * 63 // 64
    assert exchanged.outside == exchanged.payload * 7 // 8


def test_ddp_needs_what_one_gpu_does_and_its_buckets():
    config = DeepseekMoeConfig.preset("deepseek-v2-lite")
    recipe = recipe_of(gradient_checkpointing=True, **{"training.per_device_train_batch_size": 1})
    memory = MemoryPlan(config, recipe).memory()
    need = need_of_rank(config, recipe, Layout(replicate=8))
    assert need.weights + need.optimizer == memory.static
    assert need.gradients + need.activations == memory.peak - memory.static
    assert need.gathered == memory.all_gradients
    assert [(each.kind, each.sent) for each in need.traffic] == [("all-reduce", 2 * memory.all_gradients * 7 // 8)]


def test_activations_shrink_with_the_experts_that_a_rank_has():
    config = DeepseekMoeConfig.preset("deepseek-v2-lite")
    recipe = plan_recipe("full", "deepseek-v2-lite", ["dtype=bfloat16"])
    fsdp, ep, tp = (
        need_of_rank(config, recipe, each) for each in (Layout(shard=8), Layout(shard=8, ep=8), Layout(tp=8))
    )
    assert fsdp.weights == pytest.approx(ep.weights, rel=0.01)
    of_experts = 3 * 64 * 1408 * 2048 * 2
    # Two layers and the gradients of one are gathered; a rank of eight has an eighth of the experts.
    assert fsdp.gathered - ep.gathered == 3 * of_experts * 7 / 8
    assert tp.gathered == 0 and tp.activations < fsdp.activations


def test_the_layout_to_take_is_the_quickest_that_fits_and_else_the_smallest():
    config = DeepseekMoeConfig.preset("deepseek-v2-lite")
    needs = plan_layouts(config, plan_recipe("full", "deepseek-v2-lite", ["dtype=bfloat16"]), 8)
    assert len(needs) == 4
    best, fits = recommended(needs, 80 * GIB)
    assert fits and best.layout == Layout(shard=8, ep=8)
    assert all(best.seconds <= each.seconds for each in needs if each.total <= 80 * GIB)
    everything, fits = recommended(needs, 10_000 * GIB)
    assert fits and everything is needs[0]
    smallest, fits = recommended(needs, GIB)
    assert not fits and smallest.total == min(each.total for each in needs)


def test_lora_that_fits_whole_is_left_to_ddp():
    facts = layout_facts("deepseek-v2-lite", "lora_all", [], 80 * GIB, 8)
    assert facts["recommended"] == "DDP"
    assert layout_facts("deepseek-v2-lite", "lora_all", [], 12 * GIB, 8)["recommended"] == "EP 8 x FSDP 8"
    assert not [each for each in facts["layouts"] if "TP" in each["name"]]  # no LoRA under it


def test_a_number_of_gpus_gets_its_layouts_and_a_line_for_the_recipe():
    result = call("moonlight-16b-a3b", "full", "dtype=bfloat16", "--gpus", "8", "--gpu-memory", "80GB")
    assert result.exit_code == 0
    assert "take EP 8 x FSDP 8: parallel: {shard: 8, replicate: 1, ep: 8, tp: 1}" in result.stdout
    assert "gradients" in result.stdout and "on each of 8 GPUs" in result.stdout


def test_several_numbers_are_compared_and_no_recipe_means_full():
    facts = json.loads(call("deepseek-v2-lite", "--gpus", "2,16", "--json").stdout)
    assert [each["gpus"] for each in facts] == [2, 16]
    assert all(each["recipe"] == "full" and each["layouts"] for each in facts)
    shown = call("deepseek-v2-lite", "--gpus", "2,16").stdout
    assert "Layouts of 2 GPUs" in shown and "Layouts of 16 GPUs" in shown


def test_where_none_fits_the_smallest_is_named():
    shown = call("deepseek-v3", "full", "dtype=bfloat16", "--gpus", "8,16").stdout
    assert "none fits into 80 GiB; " in shown


@pytest.mark.parametrize("gpus", ["0", "8,0", "eight", "8,", "-8", "1.5", ""])
def test_a_wrong_number_of_gpus_is_one_line(gpus):
    result = call("deepseek-v2-lite", "full", f"--gpus={gpus}")
    assert (result.exit_code, result.stdout, len(result.stderr.splitlines())) == (1, "", 1)
    assert f"--gpus is {gpus}: it is a number of GPUs, at least 1" in result.stderr


def test_more_ranks_than_are_planned_for_are_refused():
    result = call("deepseek-v2-lite", "full", "--gpus", "4096")
    assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1)
    assert "up to 2,048" in result.stderr


@pytest.mark.parametrize("recipe", ["qlora_experts", "dpo", "esft_token"])
def test_recipes_without_layouts_are_planned_as_ever(recipe):
    facts = json.loads(call("deepseek-v2-lite", recipe, "--gpus", "8", "--json").stdout)
    assert "layouts" not in facts and facts["gpus"] == 8


def test_a_process_of_a_group_is_told_to_plan_alone(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(UserError, match="without torchrun"):
            spreads_of(tiny_config("v3"), recipe_of(), Layout(shard=2))
    finally:
        torch.distributed.destroy_process_group()


def test_planning_leaves_no_process_group_behind():
    spreads_of(tiny_config("v3"), recipe_of(), Layout(shard=16, ep=2, inside_experts=True))
    assert not torch.distributed.is_initialized()
    assert fsdp_of_transformers.fully_shard is fully_shard


def test_the_readmes_table_of_layouts_has_the_figures_of_v2_lite():
    rows = [line for line in layout_table(COUNTS[:2], ["deepseek-v2-lite"]).splitlines() if "V2-Lite" in line]
    text = README.read_text(encoding="utf-8")
    assert len(rows) == 2
    for row in rows:
        assert row in text, "put `deepseek-moe plan --table --gpus 8,64,256,2048` into the README"


@pytest.mark.slow
def test_the_readmes_table_of_layouts_is_what_the_command_prints():
    assert len(TABLE_MODELS) == 5
    assert layout_table(list(COUNTS)) in README.read_text(encoding="utf-8")
