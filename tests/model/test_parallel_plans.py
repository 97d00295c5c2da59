"""The parallel plans are data that names real modules and known styles; no process group is needed here."""

import pytest
import torch
from tiny import CONFIG_OF_LINEAGE, tiny_config, tiny_ids, tiny_model
from transformers import AutoModelForCausalLM, DistributedConfig
from transformers.distributed.fsdp import ALL_FSDP_STYLES
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES, replace_layer_number_by_wildcard
from transformers.distributed.pipeline_parallel import PipelineIdentityLayer

VARIANTS = {
    **{lineage: {} for lineage in CONFIG_OF_LINEAGE},
    "v3 without dense layers": {"first_k_dense_replace": 0},
    "v3 without shared experts": {"n_shared_experts": None},
    "v2 with a dense layer between": {"moe_layer_freq": 2},
    "v1 without experts": {"n_routed_experts": None, "num_experts_per_tok": None},
}


def config_of(variant: str):
    return tiny_config(variant.split()[0], **VARIANTS[variant])


def names_of(model) -> set[str]:
    modules = [name for name, _ in model.named_modules()] + [name for name, _ in model.named_parameters()]
    return {replace_layer_number_by_wildcard(name) for name in modules}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tensor_parallel_rule_names_a_module_and_a_known_style(variant):
    model = tiny_model(config_of(variant))
    assert model.tp_plan["lm_head"] and set(model.tp_plan) <= names_of(model)
    assert all(style in ALL_PARALLEL_STYLES for style in model.tp_plan.values()), model.tp_plan


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_large_matrix_of_a_layer_has_a_rule(variant):
    """What stays whole on every rank is small: norms, gates, the compressions, and the joint of an MTP module."""
    model = tiny_model(config_of(variant))
    plan = model.tp_plan
    whole = set()
    for name, parameter in model.named_parameters():
        generic = replace_layer_number_by_wildcard(name)
        if parameter.dim() > 1 and generic not in plan and generic.rpartition(".")[0] not in plan:
            whole.add(generic.removesuffix(".weight").rpartition(".")[2])
    assert whole <= {"q_a_proj", "gate", "eh_proj"}


@pytest.mark.parametrize("variant", [name for name in VARIANTS if "without experts" not in name])
def test_every_expert_parallel_rule_names_a_module_and_a_known_style(variant):
    model = tiny_model(config_of(variant))
    assert model.ep_plan and set(model.ep_plan) <= names_of(model)
    assert all(style in ALL_PARALLEL_STYLES for style in model.ep_plan.values()), model.ep_plan


@pytest.mark.parametrize("variant", VARIANTS)
def test_pipeline_and_fsdp_plans_name_modules(variant):
    model = tiny_model(config_of(variant))
    assert set(model.pp_plan) == {"model.embed_tokens", "model.layers", "model.norm", "lm_head"}
    assert set(model.pp_plan) <= names_of(model)
    assert set(model.fsdp_plan) <= names_of(model)
    assert set(model.fsdp_plan.values()) <= set(ALL_FSDP_STYLES)


@pytest.mark.parametrize("plan", ["tp", "ep"])
@pytest.mark.parametrize("variant", [name for name in VARIANTS if "without experts" not in name])
def test_transformers_resolves_the_plans_without_a_warning(variant, plan, caplog):
    model = tiny_model(config_of(variant))
    sizes = {"tp_size": 2} if plan == "tp" else {"fsdp_size": 2, "ep_size": 2}
    with caplog.at_level("WARNING", logger="transformers"):
        resolved = dict(
            zip(("tp", "ep", "fsdp"), model._resolve_parallel_plans(DistributedConfig(**sizes)), strict=True)
        )
    assert not caplog.messages
    assert resolved[plan]


@pytest.mark.parametrize("lineage", CONFIG_OF_LINEAGE)
def test_loading_without_parallelism_says_nothing_of_plans(lineage, tmp_path, caplog):
    tiny_model(tiny_config(lineage)).save_pretrained(tmp_path)
    with caplog.at_level("WARNING", logger="transformers"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not [message for message in caplog.messages if "plan" in message]


@pytest.mark.parametrize("lineage", ["v1", "v3"])
@torch.no_grad()
def test_pipeline_stages_with_placeholders_for_other_stages_layers_compute_the_whole_model(lineage):
    """Each stage holds all modules, those of the others replaced as transformers' pipeline parallelism does."""
    config = tiny_config(lineage)
    whole, first, last = (tiny_model(config) for _ in range(3))
    for layer in range(1, len(first.model.layers)):
        first.model.layers[layer] = PipelineIdentityLayer()
    first.model.norm = PipelineIdentityLayer()
    last.model.layers[0] = PipelineIdentityLayer()
    ids = tiny_ids(config)
    hidden_states = first.model(ids).last_hidden_state
    assert torch.equal(last(inputs_embeds=hidden_states).logits, whole(ids).logits)
