"""Weights in four bits under LoRA: values, products, gradients, memory, and whole runs."""

import copy
import json
import sys

import bitsandbytes
import pytest
import torch
from adapted_pair import assert_same, gradients, logits, randomize
from one_rank import under_ddp
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import tiny_config, tiny_ids, tiny_model
from tiny_run import stopped_at, tiny_base, tiny_values
from torch.multiprocessing.reductions import StorageWeakRef

from modeling_deepseek_moe import DeepseekMoeForCausalLM
from modeling_deepseek_moe.expert_lora import load_adapter
from modeling_deepseek_moe.finetune.errors import RecipeError, UserError
from modeling_deepseek_moe.finetune.model.lora import lora_config
from modeling_deepseek_moe.finetune.model.quantization import leave_out_of_ddp
from modeling_deepseek_moe.finetune.recipe.load import make_recipe
from modeling_deepseek_moe.finetune.train import one_run as train
from modeling_deepseek_moe.kernels.sorted import rows as sorted_rows
from modeling_deepseek_moe.quantized import weights as quantized_weights
from modeling_deepseek_moe.quantized.loading import NF4Config, quantize_weights
from modeling_deepseek_moe.quantized.weights import NF4_BLOCK, NF4Weight, quantize

RAGGED = {"hidden_size": 36, "moe_intermediate_size": 18}  # 648 values an expert's down projection: 10 blocks and 8
shapes = pytest.mark.parametrize("widths", [{}, RAGGED], ids=["whole blocks", "a ragged last block"])


def in_four_bits(model) -> dict[str, NF4Weight]:
    return {name: weight for name, weight in model.named_parameters() if isinstance(weight, NF4Weight)}


def values(weight: NF4Weight) -> torch.Tensor:
    if weight.ndim == 2:
        return weight.dequantize()
    return torch.stack([weight[expert] for expert in range(len(weight))])


def twins(**overrides):
    """A quantised model, and a plain one that holds its values and multiplies as the reference does."""
    plain = tiny_model(tiny_config("v3", num_nextn_predict_layers=0, **overrides))
    quantised = quantize_weights(copy.deepcopy(plain))
    with torch.no_grad():
        for name, weight in in_four_bits(quantised).items():
            plain.get_parameter(name).copy_(values(weight))
    plain.set_experts_implementation("eager")
    return quantised, plain


def adapted_twins(**overrides):
    """The same with the same adapters on everything, the plain one's being PEFT's own."""
    quantised, plain = twins(**overrides)
    ours = lora_config(quantised, ["all"], r=4)
    targets = {"target_modules": ours.target_modules, "target_parameters": ours.target_parameters}
    adapted = get_peft_model(quantised, ours), get_peft_model(plain, LoraConfig(r=4, lora_alpha=32, **targets))
    for model in adapted:
        randomize(model, seed=1)
        model.eval()
    return adapted


@shapes
def test_outputs_and_gradients_are_those_of_the_reference_on_the_dequantised_weights(widths):
    ours, reference = adapted_twins(**widths)
    assert_same(logits(ours), logits(reference))
    actual, expected = gradients(ours), gradients(reference)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.any(), name
        # float32: the same sums in another order, through backward passes of three layers.
        assert_same(actual[name], gradient, tolerance=5e-5)


def test_a_layers_products_wait_for_its_counts_once_and_for_nothing_else(monkeypatch):
    """What would wait for a GPU's results: anything that brings a value to Python or copies between devices."""
    ours, _ = adapted_twins(n_shared_experts=None)
    experts = ours.get_base_model().model.layers[1].mlp.experts
    x, weights = torch.randn(40, 32, requires_grad=True), torch.rand(40, 3)
    index = torch.rand(40, 8).topk(3).indices
    waits = []

    def counted(name):
        real = getattr(torch.Tensor, name)

        def call(tensor, *args, **kwargs):
            waits.append(name)
            return real(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, call)

    for name in ("item", "tolist", "numpy", "cpu", "cuda", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
        counted(name)
    output = experts(x, index, weights)
    assert waits == ["tolist"]
    output.sum().backward()
    assert waits == ["tolist"] and x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(128, 64), (48, 32), (7, 14), (18, 36)], ids=str)
def test_an_expert_has_the_values_that_bitsandbytes_gives_it(shape, dtype):
    stack = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight = quantize(stack)
    assert (weight.shape, weight.dtype) == (stack.shape, dtype)
    for expert in range(3):
        # As one row, which it reads right whatever the shape is.
        packed, state = bitsandbytes.functional.quantize_4bit(stack[expert].flatten(), quant_type="nf4")
        expected = bitsandbytes.functional.dequantize_4bit(packed, state).flatten()
        assert torch.equal(weight[expert].flatten(), expected)
        magnitude = state.absmax.repeat_interleave(NF4_BLOCK)[: expected.numel()].view(shape)
        # Levels are at most 0.304 of the block's magnitude apart; bfloat16 rounds the value by 2^-9 more.
        assert ((weight[expert] - stack[expert]).abs() <= 0.155 * magnitude).all()


def test_a_quantised_model_takes_four_and_a_half_bits_a_weight():
    quantised, plain = twins()
    found = in_four_bits(quantised)
    left = {name for name, _ in plain.named_parameters()} - found.keys()
    assert all("norm" in name or name.endswith(("mlp.gate.weight", "tokens.weight", "head.weight")) for name in left)
    assert sum(8 * weight.held_bytes for weight in found.values()) == 4.5 * sum(map(torch.numel, found.values()))


def test_one_matrix_at_a_time_is_dequantised_and_only_of_experts_in_use(monkeypatch):
    model = adapted_twins()[0].train()
    real, seen = quantized_weights.dequantize_matrix, []

    def watched(packed, *args):
        assert all(storage.expired() for _, storage in seen)
        matrix = real(packed, *args)
        seen.append((packed.data_ptr(), StorageWeakRef(matrix.untyped_storage())))
        return matrix

    monkeypatch.setattr(quantized_weights, "dequantize_matrix", watched)
    # As on CUDA, where one product takes all experts of plain weights.
    monkeypatch.setattr(sorted_rows, "grouped", lambda device: True)
    ids = tiny_ids(model.config, batch=1, length=2)
    model(ids, labels=ids, use_cache=False).loss.backward()
    experts = [weight for name, weight in in_four_bits(model).items() if ".experts." in name]
    for weight in experts:
        times = [[place for place, _ in seen].count(packed.data_ptr()) for packed in weight.packed]
        # Two tokens choose three experts each of eight; forward and backward.
        assert set(times) == {0, 2} and 3 <= times.count(2) <= 6


def test_a_checkpoint_quantised_while_it_is_read_is_the_same_model(base):
    loaded = DeepseekMoeForCausalLM.from_pretrained(base, quantization_config=NF4Config())
    in_memory = quantize_weights(DeepseekMoeForCausalLM.from_pretrained(base, experts_implementation="eager"))
    assert in_four_bits(loaded).keys() == in_four_bits(in_memory).keys()
    for name, weight in in_four_bits(loaded).items():
        other = in_memory.get_parameter(name)
        assert torch.equal(weight.packed, other.packed) and torch.equal(weight.magnitudes, other.magnitudes)
    assert torch.equal(logits(loaded), logits(in_memory))
    assert torch.equal(logits(loaded.to(torch.bfloat16)), logits(copy.deepcopy(loaded)))


def test_adapters_are_disabled_added_and_used_for_generation():
    ours, reference = adapted_twins()
    for model in (ours, reference):
        model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
        randomize(model, seed=2)
        model.base_model.set_adapter(["default", "second"])
    assert_same(logits(ours), logits(reference))
    with ours.disable_adapter(), reference.disable_adapter():
        assert_same(logits(ours), logits(reference))
    ids = tiny_ids(ours.config)
    asked = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 2}
    assert torch.equal(ours.generate(input_ids=ids, **asked), reference.generate(input_ids=ids, **asked))


def test_an_interrupted_run_ends_as_if_it_had_not_been_and_its_adapter_is_an_ordinary_one(tmp_path, base):
    def recipe(folder):
        (tmp_path / folder).mkdir(exist_ok=True)
        return make_recipe(tiny_values(tmp_path / folder, base, quantization="nf4", gradient_checkpointing=True))

    at_once = train.run(recipe("a"))
    with stopped_at(3):
        train.run(recipe("b"))
    in_two = train.run(recipe("b"))
    assert in_two["resumed_from"] == "checkpoint-2"
    assert at_once["eval_loss_after"] == in_two["eval_loss_after"] < at_once["eval_loss_before"]
    one, other = (load_file(tmp_path / name / "run" / "adapter" / "adapter_model.safetensors") for name in "ab")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)

    plain, quantised = (
        DeepseekMoeForCausalLM.from_pretrained(base, quantization_config=quantization)
        for quantization in (None, NF4Config())
    )
    with torch.no_grad():
        for name, weight in in_four_bits(quantised).items():
            plain.get_parameter(name).copy_(values(weight))
    before = logits(plain)
    stock = PeftModel.from_pretrained(plain, at_once["saved_adapter"]).eval()
    assert_same(logits(load_adapter(quantised, at_once["saved_adapter"]).eval()), logits(stock))
    assert not torch.allclose(logits(stock), before, atol=1e-2)


def test_a_step_under_ddp_has_the_gradients_of_one_without(tmp_path):
    (model, _), (other, _) = adapted_twins(), adapted_twins()
    leave_out_of_ddp(model)
    ids = tiny_ids(model.config)

    def step(wrapped) -> None:
        wrapped(input_ids=ids, labels=ids).loss.backward()

    under_ddp(tmp_path, model, step)
    step(other)
    trained = [
        (a.grad, b.grad) for a, b in zip(model.parameters(), other.parameters(), strict=True) if a.requires_grad
    ]
    assert trained and all(torch.equal(a, b) and a.any() for a, b in trained)


def test_what_four_bits_cannot_do_says_the_way_out(tmp_path, base):
    model, _ = twins()
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        model.set_experts_implementation(implementation)
        with pytest.raises(ValueError, match='experts need experts_implementation="sorted_mm"'):
            logits(model)
    model.set_experts_implementation("sorted_mm")
    with pytest.raises(ValueError, match="save the adapter, and merge it into the unquantised checkpoint"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    stock = get_peft_model(copy.deepcopy(model), LoraConfig(target_parameters=["experts.down_proj"]))
    with pytest.raises(ValueError, match="adapters by `modeling_deepseek_moe.expert_lora`"):
        logits(stock)
    adapted = get_peft_model(model, lora_config(model, ["all"]))
    with pytest.raises(ValueError, match="deepseek-moe convert MODEL TARGET --to bf16 --adapter ADAPTER"):
        adapted.merge_and_unload()
    model.set_experts_implementation("deepgemm")
    with pytest.raises(ValueError, match="in four bits cannot be computed: experts_implementation='deepgemm'"):
        logits(adapted)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"merge": True}, "set merge: false, and merge the adapter into the model itself"),
        ({"bias_update_speed": 0.001}, "`bias_update_speed` moves the routers' bias: set it to 0"),
        ({"experts_implementation": "eager"}, "`experts_implementation` is 'eager': leave it out"),
        ({"lora": {}}, "set `lora.targets`, or leave `quantization` out"),
        ({"esft.top_p": 0.5}, "leave the `esft` keys out"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_recipe_keys_that_do_not_go_with_four_bits_are_refused(tmp_path, keys, message):
    given = {"model": "m", "data": "d", "output_dir": str(tmp_path), "lora.targets": ["all"], "quantization": "nf4"}
    if "lora" in keys:
        del given["lora.targets"]
    with pytest.raises(RecipeError, match=message):
        make_recipe(given | keys)


def test_a_run_says_what_it_lacks_for_four_bits(tmp_path, base, monkeypatch):
    recipe = make_recipe(tiny_values(tmp_path, base, quantization="nf4"))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "bitsandbytes", None)
        with pytest.raises(UserError, match="need bitsandbytes, which is not installed: pip install"):
            train.run(recipe)
    of_fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    fp8 = tiny_base(tmp_path / "fp8")
    config = fp8 / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": of_fp8}))
    with pytest.raises(UserError, match=r"quantised already \(fp8\): .* --to bf16"):
        train.run(make_recipe(tiny_values(tmp_path, fp8, quantization="nf4")))
