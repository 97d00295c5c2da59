"""`deepseek-moe plan`: its figures against the peaks of real training steps, and what it says to whom."""

import json
import sys
from pathlib import Path

import pytest
import torch
from machines import pretend
from places import BENCHMARKS, ROOT
from tiny import tiny_config, tiny_model
from transformers.training_args import OptimizerNames
from typer.testing import CliRunner

from modeling_deepseek_moe import DeepseekMoeConfig
from modeling_deepseek_moe.checkpoint_layout import parameter_counts
from modeling_deepseek_moe.cli.main import app
from modeling_deepseek_moe.finetune.errors import UserError
from modeling_deepseek_moe.finetune.model.load import add_adapters
from modeling_deepseek_moe.finetune.plan.fit import need_of, plan_recipe, read_memory
from modeling_deepseek_moe.finetune.plan.memory import OPTIMIZERS, MemoryPlan
from modeling_deepseek_moe.finetune.plan.report import TABLE_MODELS, plan_facts, plan_table, smallest_fit
from modeling_deepseek_moe.finetune.recipe.load import SHIPPED, make_recipe
from modeling_deepseek_moe.presets import released_json

README = ROOT / "finetune" / "README.md"
# Issue 6 demands it of the whole peak. Of what a step needs beyond weights and optimizer state it is harder.
BOUND = 0.1

_ATTENTION = {"kv_lora_rank": 32, "q_lora_rank": None, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
_SIZES = {
    "vocab_size": 600,
    "hidden_size": 128,
    "intermediate_size": 320,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "max_position_embeddings": 512,
    "dtype": "float32",
}
V1 = {**_SIZES, "model_type": "deepseek", "moe_intermediate_size": 192}
V3 = {**_SIZES, **_ATTENTION, "model_type": "deepseek_v3", "num_nextn_predict_layers": 1}
_BATCH = {"max_length": 128, "training.per_device_train_batch_size": 4}
STEPS = {
    "full, MTP": (V3, {"losses.mtp_loss_weight": 0.3}),
    "full, autocast, checkpointing": (V3, {"training.bf16": True, "gradient_checkpointing": True}),
    "full, accumulated, sgd, loss in chunks": (
        {**V1, "loss_chunk_bytes": 2**18},
        {"training.gradient_accumulation_steps": 2, "training.optim": "sgd"},
    ),
    "LoRA with dropout, bfloat16, padded": (
        V3,
        {"dtype": "bfloat16", "lora.targets": ["attention", "shared_experts"], "lora.lora_dropout": 0.1},
    ),
    "LoRA on experts, bfloat16": (V1, {"dtype": "bfloat16", "lora.targets": ["routed_experts", "router"]}),
}


@pytest.fixture(scope="module")
def measured_step():
    """The benchmark's function."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import step_memory

        yield step_memory.measured_step
        sys.modules.pop("step_memory")


def recipe_of(**values):
    return make_recipe({"model": "model", "data": "data", "output_dir": "out", **values})


def call(*arguments):
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if "MTP" in name else []) for name in STEPS]
)
def test_the_peak_of_a_real_step_is_within_a_tenth(measured_step, name, monkeypatch):
    pretend(monkeypatch, torch.bfloat16)  # without instructions for it attention keeps its tensors in float32
    fields, values = STEPS[name]
    values, padded = {**_BATCH, **values}, "padded" in name
    peak = measured_step(fields, values, padded)
    memory = MemoryPlan(DeepseekMoeConfig.from_dict(fields), recipe_of(**values), "cpu").memory(is_padded=padded)
    assert memory.peak == pytest.approx(peak, rel=BOUND)
    assert memory.peak - memory.static == pytest.approx(peak - memory.static, rel=BOUND)


@pytest.mark.parametrize("targets", [[], ["attention"], ["all"]], ids=["full", "attention", "all"])
@pytest.mark.parametrize("lineage", ["v1", "v3"])
def test_weights_are_those_of_the_whole_model_with_adapters(lineage, targets):
    config = tiny_config(lineage, num_hidden_layers=7, first_k_dense_replace=2)
    recipe = recipe_of(**{"lora.targets": targets, "lora.r": 3} if targets else {}, dtype="bfloat16")
    model = add_adapters(tiny_model(config).to(torch.bfloat16), recipe)
    tensors = [*model.parameters(), *model.buffers()]
    memory = MemoryPlan(config, recipe).memory()
    assert sum(memory.weights.values()) == sum(tensor.nbytes for tensor in tensors)
    assert memory.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert memory.all_gradients == sum(p.nbytes for p in model.parameters() if p.requires_grad)


def test_adapters_on_some_layers_are_counted_there():
    config = tiny_config("v3", num_hidden_layers=6)
    layers = [2, 4, 5]
    recipe = recipe_of(**{"lora.targets": ["attention"], "lora.layers_to_transform": layers})
    model = add_adapters(tiny_model(config), recipe)
    assert MemoryPlan(config, recipe).memory().trained == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_a_model_of_671_billion_parameters_is_planned_whole():
    facts = plan_facts("deepseek-v3", "lora_shared", ["lora.r=16"])
    config = DeepseekMoeConfig.from_dict(released_json("deepseek-v3"))
    total, _ = parameter_counts(config)
    # With its layer for multi-token prediction, 1.7 % more.
    assert total < facts["parameters"] - facts["trained_parameters"] < 1.02 * total
    assert facts["trained_parameters"] == 58 * 3 * 16 * (7168 + 2048)
    assert facts["parts"]["weights: routed experts"] == 2 * 59 * 256 * 3 * 7168 * 2048


@pytest.mark.parametrize(
    ("optim", "bytes_of_a_number"),
    [("adamw_torch_fused", 4), ("sgd", 0), ("paged_adamw_32bit", 8), ("adamw_8bit", 2 + 8 / 256)],
)
def test_optimizer_states_are_counted_by_the_optimizer(optim, bytes_of_a_number):
    config = DeepseekMoeConfig.from_dict(released_json("deepseek-v2-lite"))
    memory = MemoryPlan(config, recipe_of(**{"training.optim": optim}, dtype="bfloat16")).memory()
    # Norms are too small for eight bits.
    assert memory.optimizer == pytest.approx(memory.trained * bytes_of_a_number, rel=1e-3)


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_every_known_optimizer_is_one_of_the_trainers(optim):
    assert recipe_of(**{"training.optim": optim}).training["optim"] in {each.value for each in OptimizerNames}


def test_four_bits_take_four_and_a_half_and_are_not_sharded():
    plain, nf4 = (
        plan_facts("deepseek-v2-lite", "lora_shared", [] if bits == 16 else ["quantization=nf4"]) for bits in (16, 4)
    )
    name = "weights: routed experts"
    assert nf4["parts"][name] == plain["parts"][name] * 4.5 / 16
    config = DeepseekMoeConfig.from_dict(released_json("deepseek-v2-lite"))
    plan = MemoryPlan(config, plan_recipe("lora_shared", "deepseek-v2-lite", ["quantization=nf4"]))
    assert need_of(plan, plan.memory(), gpus=8) == need_of(plan, plan.memory())


def test_esft_has_gradients_of_the_chosen_experts_only(tmp_path):
    path = tmp_path / "expert_cfg.json"
    chosen = {str(layer): [5, 9, 40] for layer in range(1, 27)}
    path.write_text(json.dumps({"experts": chosen, "shared_experts": False, "non_expert_modules": False}))
    config = DeepseekMoeConfig.from_dict(released_json("deepseek-v2-lite"))
    memory = MemoryPlan(config, recipe_of(**{"esft.experts": str(path)})).memory()
    assert memory.trained == 26 * 3 * 3 * 2048 * 1408
    assert memory.all_gradients == 4 * memory.trained


def test_what_fits_grows_with_the_memory_and_is_the_most():
    facts = plan_facts("deepseek-v2-lite", "lora_attention", [], read_memory("48GB"))
    rows, length = facts["most_rows"], facts["longest_rows"]
    assert facts["fits"] and facts["rows"] <= rows and facts["length"] <= length and not facts["advice"]
    for changes, fits in (
        ([f"training.per_device_train_batch_size={rows}"], True),
        ([f"training.per_device_train_batch_size={rows + 1}"], False),
        ([f"max_length={length}"], True),
        ([f"max_length={length + 1}"], False),
    ):
        assert (plan_facts("deepseek-v2-lite", "lora_attention", changes)["total"] <= 48 * 2**30) == fits
    assert plan_facts("deepseek-v2-lite", "lora_attention", [], read_memory("80GB"))["most_rows"] > rows


def test_advice_holds_what_it_promises():
    available = read_memory("24GB")
    advice = plan_facts("deepseek-v2-lite", "lora_shared", ["gradient_checkpointing=false"], available)["advice"]
    recipes = [each for each in advice if not each["changes"][-1].startswith(("--gpus", "weights"))]
    assert [each["fits"] for each in recipes] == [False] * (len(recipes) - 1) + [True]
    overrides = ["gradient_checkpointing=false"]
    for each in recipes:
        words = [*overrides, *(word for change in each["changes"] for word in change.split())]
        assert plan_facts("deepseek-v2-lite", "lora_shared", words)["total"] == each["total"]
    *changes, gpus = next(each for each in advice if each["changes"][-1].startswith("--gpus"))["changes"]
    words, count = (
        [*overrides, *(word for change in changes for word in change.split())],
        int(gpus.split()[1].strip(",")),
    )
    assert plan_facts("deepseek-v2-lite", "lora_shared", words, available, count)["fits"]


def test_the_command_prints_what_fits_and_what_would_help():
    result = call("deepseek-ai/DeepSeek-V2-Lite", "full", "--gpu-memory", "80 GiB")
    assert result.exit_code == 0
    assert "does not fit into 80 GiB" in result.stdout
    assert "paged_adamw_8bit" in result.stdout and "ZeRO-3" in result.stdout


def test_json_is_what_the_table_is_made_of():
    result = call("moonlight-16b-a3b", "lora_shared", "--json", "--gpu-memory", "48GB", "--gpus", "2")
    facts = json.loads(result.stdout)
    assert facts["total"] == sum(facts["parts"].values()) + sum(facts["estimates"].values())
    assert facts["is_sharded"] and facts["fits"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["deepseek-v2-light", "full"], "did you mean 'deepseek-v2-lite'"),
        (["./nowhere", "full"], "is no folder"),
        ([Path(__file__).parent, "full"], "give a folder with a config.json"),
        ([__file__, "full"], "give a folder with a config.json"),
        (["deepseek-v2-lite", "fulll"], "cannot read recipe fulll"),
        (["deepseek-v2-lite", "full", "lr=1"], "unknown recipe key `lr`"),
        (["deepseek-v2-lite", "full", "training.optim=galore_adamw"], "`plan` knows adamw_torch"),
        (["deepseek-v2-lite", "full", "--gpu-memory", "24"], "with its unit, such as 24GB"),
        (["deepseek-v2-lite", "full", "--gpu-memory", "0GB"], "above 0"),
        (["deepseek-v2-lite", "full", "--gpu-memory=-24GB"], "above 0"),
        (["deepseek-v2-lite", "full", "--gpus", "0"], "at least 1"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(map(str, value))[-40:],
)
def test_a_wrong_argument_is_one_line(arguments, message):
    result = call(*arguments)
    assert (result.exit_code, result.stdout, len(result.stderr.splitlines())) == (1, "", 1)
    assert message in result.stderr


@pytest.mark.parametrize(
    "text", ["[1]", "{}", '{"model_type": "llama"}', "{", '{"model_type": "deepseek_v3", "n_group": 7}']
)
def test_a_config_of_something_else_is_one_line(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    result = call(tmp_path, "lora_all")
    assert (result.exit_code, result.stdout, len(result.stderr.splitlines())) == (1, "", 1)
    assert f"cannot read the config of model '{tmp_path}'" in result.stderr


def test_a_model_and_a_recipe_or_the_table_must_be_asked_for():
    result = call("deepseek-v2-lite")
    assert result.exit_code == 2
    assert "--table" in result.output


def _cells():
    """recipe -> model -> cell of the README's table."""
    table = README.read_text(encoding="utf-8").partition("## Which recipe fits which GPU")[2].partition("\n## ")[0]
    lines = [line for line in table.splitlines() if line.startswith("| `")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {name.strip("`"): dict(zip(TABLE_MODELS, cells, strict=True)) for name, *cells in rows}


def test_the_readmes_table_has_every_recipe_and_the_figures_of_v2_lite():
    table = _cells()
    assert list(table) == list(SHIPPED)
    model = "deepseek-v2-lite"
    for recipe in SHIPPED:
        assert table[recipe][model] == smallest_fit(model, recipe), "put `deepseek-moe plan --table` into the README"


@pytest.mark.slow
def test_the_readmes_table_is_what_the_command_prints():
    assert plan_table() in README.read_text(encoding="utf-8")


def test_units_are_binary_and_need_no_case():
    assert read_memory("24GB") == read_memory("24 gib") == read_memory("24576MiB") == 24 * 2**30
    with pytest.raises(UserError, match="unit"):
        read_memory("24 bits")
