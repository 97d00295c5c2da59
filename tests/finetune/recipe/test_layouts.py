"""Recipe keys by which several processes share the weights, and what does not go with them."""

import pytest
import torch
from torch import nn

from modeling_deepseek_moe.finetune.errors import RecipeError, UserError
from modeling_deepseek_moe.finetune.model.gather import gathered
from modeling_deepseek_moe.finetune.recipe.load import dump_recipe, load_recipe, make_recipe
from modeling_deepseek_moe.finetune.train.one_run import training_arguments

VALUES = {"model": "m", "data": "rows.jsonl", "output_dir": "run", "training.use_cpu": True}
LORA = {"lora.targets": ["attention"]}
CONFIG = {"cpu_ram_efficient_loading": True, "state_dict_type": "SHARDED_STATE_DICT"}


def test_every_key_can_be_written_in_a_file_and_on_the_command_line(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "{model: m, data: rows.jsonl, output_dir: run, training: {fsdp: true, fsdp_config: {version: 2}, "
        "parallelism_config: {dp_shard_size: 2}}}"
    )
    recipe = load_recipe(file, ["training.fsdp_config={cpu_offload: true}"])
    assert recipe.training["fsdp"] is True
    assert recipe.training["fsdp_config"] == {"cpu_offload": True}
    assert recipe.training["parallelism_config"] == {"dp_shard_size": 2}
    assert load_recipe(file, ["training.fsdp=full_shard"]).training["fsdp"] == "full_shard"
    plain = tmp_path / "plain.yaml"
    plain.write_text("{model: m, data: rows.jsonl, output_dir: run}")
    for given in ("zero3.json", "{zero_optimization: {stage: 3}}"):
        assert load_recipe(plain, [f"training.deepspeed={given}"]).training["deepspeed"]
    file.write_text(dump_recipe(recipe))
    assert load_recipe(file) == recipe


def test_making_the_arguments_leaves_the_recipe_as_it_is():
    recipe = make_recipe({**VALUES, "training.fsdp": True, "training.fsdp_config": dict(CONFIG)})
    assert training_arguments(recipe).fsdp_plugin_args["cpu_ram_efficient_loading"] is True
    assert recipe.training["fsdp_config"] == CONFIG


@pytest.mark.parametrize(
    "values, said",
    [
        ({**LORA, "quantization": "nf4"}, "`quantization` is nf4, whose weights are not cut up, but `training.fsdp`"),
        (
            {**LORA, "merge": True},
            "`merge` is true, but with `training.fsdp` .*`deepseek-moe convert m",
        ),
        ({"esft.top_p": 0.2}, "`training.fsdp` cuts up stacks of experts"),
        ({"training.fsdp_config": {"version": 2}, "training.fsdp": None}, "has no effect"),
        ({"training.deepspeed": {"zero_optimization": {"stage": 3}}}, "two ways to shard"),
        (
            {"training.parallelism_config": {"tp_size": 2}},
            "has tp_size: 2: runs take dp_replicate",
        ),
        ({"training.fsdp": None, "training.parallelism_config": {"dp_shard_size": 2}}, "set `training.fsdp`, too"),
    ],
    ids=["four bits", "merge", "esft", "only a config", "both", "tensor parallel", "sizes alone"],
)
def test_what_does_not_go_together_is_refused_by_one_line(values, said):
    with pytest.raises(RecipeError, match=said) as caught:
        make_recipe({**VALUES, "training.fsdp": True, **values})
    assert "\n" not in str(caught.value)


def test_sharding_in_one_process_is_refused(go):
    with pytest.raises(RecipeError, match="do not go together: Using fsdp only works in distributed training"):
        go(**{"training.fsdp": True, "training.use_cpu": True})


def test_a_weight_of_which_nothing_is_here_is_never_saved():
    """As DeepSpeed leaves those that are elsewhere."""
    model = nn.Linear(3, 2, bias=False)
    assert gathered(model)["weight"].equal(model.weight)
    model.weight.data = torch.empty(0)
    with pytest.raises(UserError, match=r"weight is not saved: of \[0\] only \[0\] is here"):
        gathered(model)
