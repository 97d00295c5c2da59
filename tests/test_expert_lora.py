"""LoRA on routed experts without rebuilt weights, against PEFT's own layer: results, files, and all that PEFT does."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import tiny_config, tiny_ids, tiny_model
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

from modeling_deepseek_moe.expert_lora import ParamWrapper, load_adapter, register_expert_lora
from modeling_deepseek_moe.experts import DeepseekMoeExperts
from modeling_deepseek_moe.finetune.load_counter import LoadCounter
from modeling_deepseek_moe.finetune.lora import lora_config

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

pytestmark = pytest.mark.filterwarnings("error:LoRA on routed experts builds")


def make_config(**options) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": [], "target_parameters": EXPERTS, **options})


def randomize(model, seed: int) -> None:
    """Adapters that do something: PEFT starts B at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.1, generator=generator)


def base_model():
    """Without multi-token prediction, whose experts no loss would train."""
    return tiny_model(tiny_config("v3", num_nextn_predict_layers=0))


def pair(model=None, **options) -> tuple[PeftModel, PeftModel]:
    """The same adapted model twice: with the layer of this package and with PEFT's."""
    model = model or base_model()
    stock = get_peft_model(copy.deepcopy(model), make_config(**options))
    ours = get_peft_model(model, register_expert_lora(make_config(**options), model))
    for adapted in (ours, stock):
        randomize(adapted, seed=1)
    return ours.eval(), stock.eval()


def wrappers(model) -> list[ParamWrapper]:
    return [module for module in model.modules() if isinstance(module, ParamWrapper)]


def ids_of(model) -> torch.Tensor:
    return tiny_ids(model.config)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(ids_of(model)).logits


def assert_same(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """float32: the same sums in another order, through three layers; errors go with the largest entry."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def gradients(model) -> dict[str, torch.Tensor]:
    """Of every adapter, and of the embedded tokens, in one training step."""
    model.train()
    embedded = model.get_input_embeddings()(ids_of(model)).detach().requires_grad_()
    model(inputs_embeds=embedded, labels=ids_of(model), use_cache=False).loss.backward()
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.zero_grad()
    return {**found, "embedded": embedded.grad}


def assert_same_gradients(ours, stock) -> None:
    actual, expected = gradients(ours), gradients(stock)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.any(), name
        assert_same(actual[name], gradient)


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
    assert_same(logits(ours), logits(stock))
    assert_same_gradients(ours, stock)


def transformers_model(name: str, **options):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 96, "initializer_range": 0.1}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2, "pad_token_id": 0}
    moe = {"moe_intermediate_size": 16, "intermediate_size": 48}
    latent = {"kv_lora_rank": 16, "q_lora_rank": None, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    config, model_class = {
        "qwen3_moe": (Qwen3MoeConfig(**sizes, **moe, num_experts=6, head_dim=8), Qwen3MoeForCausalLM),
        "mixtral": (MixtralConfig(**sizes, intermediate_size=16, num_local_experts=6), MixtralForCausalLM),
        "olmoe": (OlmoeConfig(**sizes, intermediate_size=16, num_experts=6), OlmoeForCausalLM),
        "deepseek_v3": (
            DeepseekV3Config(
                **{**sizes, "num_key_value_heads": 4},
                **moe,
                **latent,
                n_routed_experts=8,
                n_group=2,
                topk_group=1,
                first_k_dense_replace=1,
            ),
            DeepseekV3ForCausalLM,
        ),
        "gpt_oss": (
            GptOssConfig(**sizes, intermediate_size=16, num_local_experts=6, head_dim=8, layer_types=None),
            GptOssForCausalLM,
        ),
    }[name]
    torch.manual_seed(0)
    return model_class(config).eval()


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


@pytest.mark.parametrize("name", ["eager", "grouped_mm", "batched_mm"])
def test_every_name_of_the_experts_product_gives_the_same(name):
    ours, stock = pair()
    for model in (ours, stock):
        model.get_base_model().set_experts_implementation(name)
    assert_same(logits(ours), logits(stock))
    assert_same_gradients(ours, stock)


def other_implementation(model, monkeypatch) -> None:
    monkeypatch.setitem(ExpertsInterface._global_mapping, "other", ALL_EXPERTS_FUNCTIONS["grouped_mm"])
    model.get_base_model().config._experts_implementation = "other"


def trained_base(model, monkeypatch) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or name.endswith("experts.base_layer.base_layer.down_proj"))


def hook(model, monkeypatch) -> None:
    for module in model.modules():
        if isinstance(module, DeepseekMoeExperts):
            module.register_forward_hook(lambda module, args, output: 2 * output)


@pytest.mark.filterwarnings("default:LoRA on routed experts builds")
@pytest.mark.parametrize(
    "change, reason",
    [
        (other_implementation, "experts_implementation='other' is not one of eager, grouped_mm, batched_mm"),
        (trained_base, "down_proj itself is trained"),
        (hook, "DeepseekMoeExperts has hooks"),
    ],
)
def test_what_could_differ_goes_through_pefts_layer_and_says_why(change, reason, monkeypatch):
    ours, stock = pair()
    for model in (ours, stock):
        change(model, monkeypatch)
    with pytest.warns(UserWarning, match=f"builds W \\+ B A of all of them: {reason}"):
        assert_same_gradients(ours, stock)


def test_ours_is_saved_as_peft_saves_and_each_loads_the_others_file(tmp_path):
    ours, stock = pair()
    files = {}
    for name, model in {"ours": ours, "stock": stock}.items():
        model.save_pretrained(tmp_path / name)
        files[name] = load_file(tmp_path / name / "adapter_model.safetensors")
    assert files["ours"].keys() == files["stock"].keys()
    assert all(torch.equal(tensor, files["stock"][name]) for name, tensor in files["ours"].items())
    experts = "base_model.model.model.layers.1.mlp.experts"
    assert {f"{experts}.base_layer.lora_A.weight", f"{experts}.lora_B.weight"} <= files["ours"].keys()

    base = base_model()
    with_stock = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    with_ours = load_adapter(copy.deepcopy(base), tmp_path / "stock").eval()
    assert wrappers(with_ours) and not wrappers(with_stock)
    assert not any(parameter.requires_grad for parameter in with_ours.parameters())
    assert torch.equal(logits(with_stock), logits(stock))
    assert torch.equal(logits(with_ours), logits(ours))


def test_an_adapter_goes_onto_a_model_that_has_others(tmp_path):
    ours, _ = pair()
    ours.save_pretrained(tmp_path)
    model = base_model()
    model = get_peft_model(model, lora_config(model, ["attention"]), adapter_name="first")
    again = load_adapter(model, tmp_path, adapter_name="second", is_trainable=True)
    assert again is model and wrappers(model)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any(".second." in name for name in trained)
    model.set_adapter("second")
    assert_same(logits(model.eval()), logits(ours), tolerance=0)


def test_adapters_are_switched_added_up_and_disabled():
    ours, stock = pair()
    for model in (ours, stock):
        model.add_adapter("second", make_config(r=2, lora_alpha=3))
        randomize(model, seed=2)
    seen = []
    for active in ("default", "second", ["default", "second"]):
        for model in (ours, stock):
            model.base_model.set_adapter(active)
        assert_same(logits(ours), logits(stock))
        assert_same_gradients(ours.eval(), stock.eval())
        seen.append(logits(ours.eval()))
    with ours.disable_adapter():
        seen.append(logits(ours))
    assert torch.equal(seen[-1], logits(base_model()))
    assert all(not torch.allclose(a, b, atol=0.01) for i, a in enumerate(seen) for b in seen[:i])
    ours.delete_adapter("second")
    assert_same(logits(ours), seen[0], tolerance=0)


def test_weighted_combinations_are_refused_as_by_peft():
    """PEFT would concatenate A of all experts in the wrong order, and knows it."""
    for model in pair():
        model.add_adapter("second", make_config())
        with pytest.raises(ValueError, match="add_weighted_adapter does not support targeting nn.Parameter"):
            model.add_weighted_adapter(["default", "second"], [0.7, -0.4], "mixed", combination_type="cat")


def test_merging_gives_the_weights_that_peft_gives_and_is_undone():
    ours, stock = pair()
    unmerged = logits(ours)
    for model in (ours, stock):
        model.merge_adapter()
    assert torch.equal(logits(ours), logits(stock))
    # The other way of adding: rounding of W + B A, through three layers.
    assert_same(logits(ours), unmerged)
    ours.unmerge_adapter()
    assert_same(logits(ours), unmerged)
    stock.unmerge_adapter()
    merged = [model.merge_and_unload().state_dict() for model in (ours, stock)]
    assert merged[0].keys() == merged[1].keys() == base_model().state_dict().keys()
    assert all(torch.equal(tensor, merged[1][name]) for name, tensor in merged[0].items())


def test_disabling_a_merged_adapter_unmerges_it():
    ours, _ = pair()
    ours.merge_adapter()
    with ours.disable_adapter():
        # Taking B A off again rounds W once more.
        assert_same(logits(ours), logits(base_model()))


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
