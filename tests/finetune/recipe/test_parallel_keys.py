"""`parallel` and `global_batch_size`: what may stand there, what it comes to, and what does not go with it."""

import dataclasses

import pytest
import transformers
from packaging.version import Version
from tiny import tiny_config
from tiny_run import tiny_base, tiny_values

from modeling_deepseek_moe.finetune.errors import RecipeError
from modeling_deepseek_moe.finetune.model.load import load
from modeling_deepseek_moe.finetune.model.spread import accumulation_steps, spread_options
from modeling_deepseek_moe.finetune.recipe.load import dump_recipe, load_recipe, make_recipe
from modeling_deepseek_moe.finetune.runs.folder import open_run
from modeling_deepseek_moe.finetune.train.one_run import training_arguments

VALUES = {"model": "m", "data": "rows.jsonl", "output_dir": "run"}
LORA = {"lora.targets": ["attention"]}


def options_of(parallel, world, monkeypatch, **config):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    return spread_options(make_recipe({**VALUES, "parallel": parallel}), tiny_config("v3", **config))


def test_the_section_can_be_written_in_a_file_and_on_the_command_line(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("{model: m, data: rows.jsonl, output_dir: run, parallel: {shard: auto, ep: 8}}")
    recipe = load_recipe(file, ["parallel.replicate=2", "global_batch_size=64"])
    assert recipe.parallel == {"shard": "auto", "ep": 8, "replicate": 2}
    assert recipe.global_batch_size == 64
    file.write_text(dump_recipe(recipe))
    assert load_recipe(file) == recipe


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.24.0"), reason="transformers spreads models rightly from 5.24 on"
)
@pytest.mark.parametrize(
    "parallel, world, sizes",
    [
        ({"shard": "auto"}, 4, (4, 1, 1, 1)),
        ({"ep": 2}, 2, (2, 1, 1, 2)),
        ({"replicate": 2, "ep": 4}, 16, (8, 2, 1, 4)),
        ({"shard": 2, "tp": 2, "ep": 4}, 4, (2, 1, 2, 4)),
    ],
)
def test_shard_auto_takes_the_processes_that_are_left(parallel, world, sizes, monkeypatch):
    config = options_of(parallel, world, monkeypatch)["distributed_config"]
    assert (config.fsdp_size, config.dp_replicate_size, config.tp_size, config.ep_size) == sizes


def test_one_process_has_all_of_the_model(monkeypatch):
    assert options_of({"shard": "auto"}, 1, monkeypatch) == {}


@pytest.mark.parametrize(
    "parallel, world, config, said",
    [
        ({"shard": 3}, 2, {}, r"shard 3 x replicate 1 x tp 1 is not the 2 processes .* `parallel.shard` to auto"),
        ({"replicate": 3}, 4, {}, "shard auto x replicate 3 x tp 1 is not the 4 processes"),
        ({"tp": 2}, 1, {}, "is not the 1 process of this run"),
        ({"ep": 3}, 3, {}, "`parallel.ep` is 3, which does not divide the 8 routed experts"),
        ({"ep": 4}, 2, {}, "`parallel.ep` is 4, which does not divide shard x tp = 2"),
        ({"ep": 2, "tp": 4}, 4, {}, "`parallel.ep` is 2 and no multiple of `parallel.tp`, 4"),
        ({"tp": 3}, 3, {}, "`parallel.tp` is 3, which does not divide num_attention_heads=4"),
        ({"ep": 2}, 2, {"first_k_dense_replace": 3, "num_nextn_predict_layers": 0}, "the model has no routed experts"),
    ],
)
def test_what_does_not_fit_processes_and_model_is_refused_by_one_line(parallel, world, config, said, monkeypatch):
    with pytest.raises(RecipeError, match=said) as caught:
        options_of(parallel, world, monkeypatch, **config)
    assert "\n" not in str(caught.value)


def test_what_does_not_fit_is_refused_before_a_weight_is_read(tmp_path, monkeypatch):
    base = tiny_base(tmp_path / "base")
    (base / "model.safetensors").unlink()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="shard 3 x"):
        load(make_recipe({**tiny_values(tmp_path, base), "parallel.shard": 3}))


def test_an_older_transformers_is_refused(monkeypatch):
    monkeypatch.setattr("modeling_deepseek_moe.finetune.model.spread._NEEDS", "99.0")
    with pytest.raises(RecipeError, match="`parallel` needs transformers 99.0, and .* use `training.fsdp: true`"):
        options_of({"ep": 2}, 2, monkeypatch)


@pytest.mark.parametrize(
    "values, said",
    [
        ({"training.fsdp": True}, "`parallel` and `training.fsdp` are two ways"),
        ({"training.deepspeed": {"zero_optimization": {"stage": 3}}}, "`parallel` and `training.deepspeed` are two"),
        ({**LORA, "quantization": "nf4"}, "`quantization` does not go with `parallel`; .*set `quantization: null`"),
        ({"esft.top_p": 0.2}, "`esft` does not go with `parallel`"),
        ({"dpo.beta": 0.1}, "`dpo` does not go with `parallel`; .*set `training.fsdp: true` instead"),
        ({**LORA, "merge": True}, "`merge` is true, but with `parallel` .*`deepseek-moe convert m"),
        ({**LORA, "parallel.tp": 2}, "`parallel.tp` is 2, under which PEFT's adapters are wrong: give these"),
        (
            {"parallel.tp": 2, "streaming": True, "eval_fraction": 0, "training.max_steps": 2},
            "`streaming` does not go with `parallel.tp: 2`",
        ),
        ({"training.fp16": True}, "`training.fp16` does not go with `parallel`.*set `training.bf16: true`"),
        ({"training.optim": "adafactor"}, "`training.optim` is 'adafactor'.*choose one of adamw_torch, "),
        ({"parallel.shard": "all"}, "`parallel.shard` is 'all', text; it must be a whole number or 'auto'"),
        ({"parallel.ep": 0}, "`parallel.ep` is 0"),
        ({"parallel.pp": 2}, "unknown recipe key `parallel.pp`"),
        (
            {"global_batch_size": 8, "training.gradient_accumulation_steps": 2},
            r"`global_batch_size` and `training.gradient_accumulation_steps: 2` both .*=null",
        ),
        (
            {"global_batch_size": 8, "training.auto_find_batch_size": True},
            "`training.auto_find_batch_size: True` both",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_by_one_line(values, said):
    with pytest.raises(RecipeError, match=said) as caught:
        make_recipe({**VALUES, "parallel.ep": 2, **values})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "values, world, steps",
    [
        ({"global_batch_size": 32, "training.per_device_train_batch_size": 2}, 4, 4),
        ({"global_batch_size": 32}, 4, 1),
        ({"global_batch_size": 32, "parallel.tp": 2, "training.per_device_train_batch_size": 4}, 4, 4),
        ({"training.gradient_accumulation_steps": 3}, 4, 3),
        ({}, 4, None),
    ],
)
def test_accumulation_follows_from_the_rows_of_a_step(values, world, steps, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    assert accumulation_steps(make_recipe({**VALUES, **values})) == steps


def test_a_shipped_recipes_accumulation_can_be_taken_back(monkeypatch):
    given = [
        "data=rows.jsonl",
        "model=m",
        "output_dir=run",
        "global_batch_size=64",
        "training.gradient_accumulation_steps=null",
    ]
    recipe = load_recipe("lora_all", [*given, "training.per_device_train_batch_size=4", "training.use_cpu=true"])
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert training_arguments(recipe).gradient_accumulation_steps == 16


@pytest.mark.parametrize("rows", [8, 20])
def test_rows_that_processes_cannot_share_are_refused(rows, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    recipe = make_recipe({**VALUES, "global_batch_size": rows, "training.per_device_train_batch_size": 4})
    with pytest.raises(RecipeError, match=f"`global_batch_size` is {rows}, which is no multiple of 16 rows"):
        accumulation_steps(recipe)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"parallel": {"ep": 4}, "training.per_device_train_batch_size": 3}, None),
        ({"parallel": {}}, "`parallel.ep`"),
        ({"global_batch_size": None}, "`global_batch_size`"),
        ({"training.learning_rate": 0.5}, "`training.learning_rate`"),
    ],
    ids=["layout and rows a process", "no layout", "other rows a step", "another rate"],
)
def test_a_run_is_the_same_in_another_layout(tmp_path, changes, said):
    values = tiny_values(tmp_path, tmp_path / "base", **{"parallel.ep": 2, "global_batch_size": 12})
    with open_run(make_recipe(values)) as opened:
        opened.keep()
    section = changes.pop("parallel", {"ep": 2})
    recipe = make_recipe({**values, **changes})
    recipe = dataclasses.replace(recipe, parallel=section)
    if said is None:
        with open_run(recipe) as opened:
            assert not opened.is_new
        return
    with pytest.raises(RecipeError, match=f"holds another run .*{said}"), open_run(recipe):
        pass
