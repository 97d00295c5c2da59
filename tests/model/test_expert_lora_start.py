"""How LoRA on stacked experts starts: held to PEFT's own linear layers expert by expert, saved, loaded and refused."""

import json

import pytest
import torch
from adapted_pair import EXPERTS, assert_same, base_model, ids_of, logits, make_config, randomize
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import KasaConfig, MontecloraConfig
from torch import nn

from modeling_deepseek_moe.expert_lora import load_adapter, register_expert_lora
from modeling_deepseek_moe.expert_lora_start import initial_factors, save_plain_lora, start_stacked
from modeling_deepseek_moe.finetune.model.lora import lora_config

STARTS = ["pissa", "pissa_niter_4", "olora", "orthogonal"]
CHANGE_THE_BASE = STARTS[:3]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def linear_lora(weight: torch.Tensor, **options):
    """PEFT's layer on a linear one of this weight, not started yet."""
    holder = nn.Sequential(nn.Linear(*weight.shape[::-1], bias=False, dtype=weight.dtype))
    with torch.no_grad():
        holder[0].weight.copy_(weight)
    config = LoraConfig(target_modules=["0"], init_lora_weights=False, **options)
    return get_peft_model(holder, config).base_model.model[0]


def start_linear(layer, how: str) -> None:
    layer._move_adapter_to_device_of_base_layer("default")
    if how == "orthogonal":
        layer.orthogonal_init("default")
    elif how == "olora":
        layer.olora_init("default")
    else:
        layer.pissa_init("default", how)
    layer._move_adapter_to_device_of_base_layer("default")


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", STARTS)
def test_every_expert_starts_as_pefts_linear_layer_of_its_weight(how, dtype, name):
    options = {"r": 6, "lora_alpha": 9, "use_rslora": name == "down_proj"}
    model = base_model().to(dtype)
    before = getattr(model.model.layers[1].mlp.experts, name).detach().clone()
    linear = [linear_lora(weight, **options) for weight in before]
    torch.manual_seed(3)
    for layer in linear:
        start_linear(layer, how)

    config = make_config(target_parameters=[f"layers.1.mlp.experts.{name}"], init_lora_weights=False, **options)
    model = get_peft_model(model, register_expert_lora(config, model), autocast_adapter_dtype=False)
    wrapper = model.get_submodule("base_model.model.model.layers.1.mlp.experts")
    torch.manual_seed(3)
    start_stacked(wrapper, "default", how)

    a, b = (getattr(wrapper, f"lora_{factor}")["default"].weight for factor in "AB")
    rest = wrapper.get_param()
    assert rest.dtype == a.dtype == b.dtype == dtype
    assert torch.equal(rest, before) == (how == "orthogonal")
    for expert, layer in enumerate(linear):
        # The same operations on the same numbers.
        assert torch.equal(a[6 * expert : 6 * expert + 6], layer.lora_A["default"].weight)
        assert torch.equal(b[:, expert::8], layer.lora_B["default"].weight)
        assert torch.equal(rest[expert], layer.base_layer.weight)


@pytest.mark.parametrize("words", [["routed_experts"], ["router"], ["all"]], ids=str)
@pytest.mark.parametrize("how", STARTS)
def test_a_model_computes_at_the_start_what_it_did_without_adapters(how, words):
    model = base_model()
    before = logits(model)
    model = get_peft_model(model, lora_config(model, words, r=4, init_lora_weights=how)).eval()
    # W - B A and B A apart: float32 rounding of weights through three layers.
    assert_same(logits(model), before, tolerance=2e-5)
    factors = initial_factors(model)
    assert factors and all(factor.any() for factor in factors.values())
    with model.disable_adapter():
        assert torch.allclose(logits(model), before, atol=1e-3) == (how == "orthogonal")


def trained(how: str, words=("all",), **options):
    """A model whose adapters moved away from their start, and that start."""
    torch.manual_seed(0)
    model = base_model()
    model = get_peft_model(model, lora_config(model, list(words), r=4, init_lora_weights=how, **options)).eval()
    start = initial_factors(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model, start


PATTERNS = {"rank_pattern": {"o_proj": 2, "layers.1.mlp.experts.gate_up_proj": 6}, "alpha_pattern": {"down_proj": 5}}


@pytest.mark.parametrize("options", [{}, PATTERNS, {**PATTERNS, "use_rslora": True}], ids=["", "patterns", "rslora"])
@pytest.mark.parametrize("how", CHANGE_THE_BASE)
def test_saved_plain_it_is_an_adapter_of_the_base_as_it_was_for_stock_peft_too(how, options, tmp_path):
    model, start = trained(how, **options)
    save_plain_lora(model, tmp_path, start)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (fields["r"], fields["init_lora_weights"]) == (8, True)
    assert not torch.allclose(logits(model), logits(base_model()), atol=0.1)
    for loaded in (PeftModel.from_pretrained(base_model(), tmp_path), load_adapter(base_model(), str(tmp_path))):
        # B A - B_0 A_0 on W instead of B A on W - B_0 A_0.
        assert_same(logits(loaded.eval()), logits(model), tolerance=5e-5)
    assert model.peft_config["default"].init_lora_weights == how  # training can go on


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("how", ["pissa", "olora", "orthogonal"])
def test_saved_as_it_is_it_is_loaded_by_repeating_the_start(how, low_cpu_mem_usage, tmp_path):
    model, _ = trained(how, words=["routed_experts"])
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)
    again = load_adapter(base_model(), str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert torch.equal(logits(again), logits(model))


def test_a_random_start_that_cannot_be_repeated_is_not_loaded(tmp_path):
    model, _ = trained("pissa_niter_4", words=["attention"])
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="init_lora_weights='pissa_niter_4'.*cannot be repeated: .*save_plain_lora"):
        load_adapter(base_model(), str(tmp_path))


def test_gradients_from_such_a_start_are_those_of_pefts_pass():
    ours, stock = (trained("pissa", words=["routed_experts"])[0] for _ in range(2))
    for model in (ours, stock):
        model.train()
    for wrapper in [module for module in stock.modules() if type(module).__name__ == "ParamWrapper"]:
        wrapper.__class__ = type(wrapper).__mro__[1]
    found = []
    for model in (ours, stock):
        model(ids_of(model), labels=ids_of(model)).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and found[0]
    for name, gradient in found[1].items():
        assert_same(found[0][name], gradient)


@pytest.mark.parametrize("how", ["eva", "corda", "loftq", "lora_ga", "mica", "pissa_niter_0", "pisa"])
def test_a_start_of_linear_layers_alone_is_refused_with_the_choices(how):
    model = base_model()
    options = {"loftq_config": {"loftq_bits": 4}} if how == "loftq" else {}
    said = rf"init_lora_weights='{how}' starts adapters of linear modules alone, not of {{}}: choose one of .*pissa"
    with pytest.raises(ValueError, match=said.format("routed_experts, router")):
        lora_config(model, ["all"], init_lora_weights=how, **options)
    assert lora_config(model, ["attention"], init_lora_weights=how, **options).init_lora_weights == how
    config = register_expert_lora(make_config(init_lora_weights=how, **options), model)
    with pytest.raises(ValueError, match=said.format("(gate_up_proj|down_proj)")):
        get_peft_model(model, config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_lora_weights": "orthogonal", "r": 3}, "needs an even rank, and that of .*_proj is 3"),
        ({"init_lora_weights": "pissa", "r": 20}, r"from matrices of \[32, .*which have no 20: give a smaller one"),
    ],
    ids=["odd rank", "rank too large"],
)
def test_a_rank_that_a_start_cannot_have_is_refused(options, message):
    model = base_model()
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, lora_config(model, ["routed_experts"], **options))


def test_weights_in_four_bits_are_not_changed_by_a_start():
    pytest.importorskip("bitsandbytes")
    from modeling_deepseek_moe.quantized.loading import quantize_weights

    model = quantize_weights(base_model())
    with pytest.raises(ValueError, match="'pissa' changes the base weights, and its weights are quantised: leave"):
        lora_config(model, ["attention"], init_lora_weights="pissa")
    with pytest.raises(ValueError, match="changes the base weights, and .*_proj is quantised or sharded .NF4Weight"):
        get_peft_model(model, register_expert_lora(make_config(init_lora_weights="pissa"), model))
    model = get_peft_model(model, lora_config(model, ["routed_experts"], r=4, init_lora_weights="orthogonal"))
    randomize(model, seed=1)
    assert torch.isfinite(logits(model.eval())).all()


@pytest.mark.parametrize(
    "option",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"alora_invocation_tokens": [1, 2]},
        {"monteclora_config": MontecloraConfig()},
        {"kasa_config": KasaConfig()},
    ],
    ids=lambda option: next(iter(option)),
)
def test_variants_of_lora_are_refused_on_stacked_weights_by_name(option):
    name, model = next(iter(option)), base_model()
    with pytest.raises(ValueError, match=rf"{name}=.* does not work with routed_experts, .*leave {name} out"):
        lora_config(model, ["routed_experts"], **option)
    config = LoraConfig(target_parameters=EXPERTS, **option)
    with pytest.raises(ValueError):  # PEFT's own layer has none of them either
        get_peft_model(model, register_expert_lora(config, model))
