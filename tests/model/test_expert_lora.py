"""LoRA on routed experts without rebuilt weights, against PEFT's layer: results, whose experts it serves, limits."""

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from adapted_pair import (
    EXPERTS,
    assert_same,
    assert_same_gradients,
    base_model,
    gradients,
    ids_of,
    logits,
    make_config,
    pair,
    wrappers,
)
from other_models import transformers_model
from peft import get_peft_model
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

from modeling_deepseek_moe.expert_lora import register_expert_lora
from modeling_deepseek_moe.experts import DeepseekMoeExperts
from modeling_deepseek_moe.finetune.model.counting import LoadCounter
from modeling_deepseek_moe.finetune.model.lora import lora_config

pytestmark = pytest.mark.filterwarnings("error:LoRA on routed experts builds")

OPTIONS = {
    "plain": {},
    "gate_up alone": {"target_parameters": EXPERTS[:1]},
    "down alone": {"target_parameters": EXPERTS[1:]},
    "rank and alpha patterns": {
        "rank_pattern": {r".*gate_up_proj": 2, r"model.layers.2.mlp.experts.down_proj": 6},
        "alpha_pattern": {r".*down_proj": 3},
    },
    "rslora": {"use_rslora": True, "r": 3},
    "one layer": {"target_parameters": [f"layers.1.{name}" for name in EXPERTS]},
    "with attention": {"target_modules": ["q_a_proj", "o_proj"]},
}


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("options", OPTIONS)
def test_logits_and_all_gradients_are_those_of_pefts_layer(options):
    ours, stock = pair(**OPTIONS[options])
    assert wrappers(ours) and not wrappers(stock)
    ranks = [wrapper.r["default"] for wrapper in wrappers(ours)]
    assert len(set(ranks)) == (3 if "patterns" in options else 1)
    assert_same(logits(ours), logits(stock))
    assert_same_gradients(ours, stock)


def test_a_model_that_accelerate_dispatched_without_offloading_runs_here():
    ours, stock = pair()
    for module in ours.modules():
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    assert_same(logits(ours), logits(stock))


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "olmoe", "deepseek_v3"])
def test_it_serves_transformers_own_experts(name):
    ours, stock = pair(transformers_model(name))
    assert len(wrappers(ours)) == (2 if name == "deepseek_v3" else 4)
    assert_same(logits(ours), logits(stock))
    assert_same_gradients(ours, stock)


def test_experts_with_biases_or_other_layouts_are_refused():
    model = transformers_model("gpt_oss")
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.experts \(GptOssExperts\) has has_bias=True"):
        register_expert_lora(make_config(), model)
    with pytest.raises(ValueError, match="GptOssForCausalLM has no routed experts that follow"):
        register_expert_lora(make_config(target_parameters=["mlp.router.weight"]), model)


@pytest.mark.parametrize("name", ["eager", "grouped_mm", "batched_mm", "sorted_mm"])
def test_every_name_of_the_experts_product_gives_the_same(name):
    ours, stock = pair()
    for model in (ours, stock):
        model.get_base_model().set_experts_implementation(name)
    assert_same(logits(ours), logits(stock))
    assert_same_gradients(ours, stock)


def other_implementation(model, monkeypatch) -> None:
    monkeypatch.setitem(ExpertsInterface._global_mapping, "other", ALL_EXPERTS_FUNCTIONS["grouped_mm"])
    model.get_base_model().config._experts_implementation = "other"


def hook(model, monkeypatch) -> None:
    for module in model.modules():
        if isinstance(module, DeepseekMoeExperts):
            module.register_forward_hook(lambda module, args, output: 2 * output)


def test_the_experts_own_weights_may_be_trained_beside_their_adapters():
    ours, stock = pair()
    for model in (ours, stock):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(
                parameter.requires_grad or name.endswith("experts.base_layer.base_layer.down_proj")
            )
    assert_same_gradients(ours, stock)


@pytest.mark.filterwarnings("default:LoRA on routed experts builds")
@pytest.mark.parametrize(
    "change, reason",
    [
        (other_implementation, "experts_implementation='other' is not one of eager, grouped_mm, batched_mm, sorted"),
        (hook, "DeepseekMoeExperts has hooks"),
    ],
)
def test_what_could_differ_goes_through_pefts_layer_and_says_why(change, reason, monkeypatch):
    ours, stock = pair()
    for model in (ours, stock):
        change(model, monkeypatch)
    with pytest.warns(UserWarning, match=f"builds W \\+ B A of all of them: {reason}"):
        assert_same_gradients(ours, stock)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_changes_no_gradient(use_reentrant):
    ours, _ = pair()
    expected = gradients(ours)
    ours.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    actual = gradients(ours)
    assert all(torch.equal(actual[name], gradient) for name, gradient in expected.items())


def test_a_half_precision_base_trains_single_precision_adapters():
    ours, stock = pair(base_model().bfloat16())
    exact = gradients(pair()[0])
    actual, other = gradients(ours), gradients(stock)
    for name, gradient in actual.items():
        assert gradient.dtype == (torch.bfloat16 if name == "embedded" else torch.float32)
        # As near to float32 as PEFT's layer, which rounds W + B A to bfloat16.
        assert (gradient - exact[name]).norm() <= 1.25 * (other[name] - exact[name]).norm()


def test_under_autocast_the_experts_keep_the_dtype_of_their_weights():
    """As `grouped_mm` does: no trace of bfloat16 in either direction."""
    results = []
    for model in pair():
        torch.manual_seed(0)
        inputs = torch.randn(5, 32), torch.tensor([[0, 1, 2]]).expand(5, 3), torch.rand(5, 3)
        layer = model.get_submodule("base_model.model.model.layers.1.mlp.experts")
        with torch.autocast("cpu", torch.bfloat16):
            output = layer(*inputs)
        output.backward(torch.randn(5, 32))
        results.append([output, *(parameter.grad for parameter in layer.parameters() if parameter.requires_grad)])
    for actual, expected in zip(*results, strict=True):
        assert actual.dtype == torch.float32
        assert_same(actual, expected)


def test_the_recipes_lora_uses_it_and_load_counters_count_as_before():
    adapted = get_peft_model(model := base_model(), lora_config(model, ["routed_experts"]))
    assert len(wrappers(adapted)) == 4
    counted = []
    for model in (adapted, base_model()):
        counter = LoadCounter(model.train())
        model(ids_of(model))
        counted.append(counter.take())
    assert counted[0].any() and torch.equal(*counted)


def test_without_routed_experts_lora_stays_pefts_own():
    model = base_model()
    assert lora_config(model, ["attention", "router"])._custom_modules is None
