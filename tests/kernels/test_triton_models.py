"""`experts_implementation="triton"` in whole models, on CPU: results and gradients are those of "eager"."""

import os
import subprocess
import sys
from types import MethodType

import pytest
import torch
from adapted_experts import make_experts, make_inputs
from adapted_pair import (
    assert_same,
    assert_same_gradients,
    base_model,
    gradients,
    ids_of,
    logits,
    make_config,
    randomize,
    wrappers,
)
from other_models import transformers_model
from peft import get_peft_model
from plain_launchers import both_ways, counterparts  # noqa: F401
from tiny import tiny_config, tiny_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.activations import ACT2FN

from modeling_deepseek_moe.expert_lora import register_expert_lora
from modeling_deepseek_moe.quantized.weights import quantize

pytestmark = pytest.mark.filterwarnings("error:LoRA on routed experts builds")


def named(model, implementation: str):
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.set_experts_implementation(implementation)
    return model


def trained_step(model, **compile_options) -> dict[str, torch.Tensor]:
    """Logits and every gradient of one training step, compiled when options are given."""
    ids = ids_of(model)
    step = torch.compile(model, fullgraph=True, **compile_options) if compile_options else model
    outputs = step(ids, labels=ids, use_cache=False)
    outputs.loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.zero_grad()
    return {"logits": outputs.logits.detach(), **found}


def assert_same_steps(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, wanted in expected.items():
        if wanted is None:
            assert actual[name] is None
        else:
            assert wanted.any(), name
            assert_same(actual[name], wanted)


MODELS = {
    "deepseek_moe": base_model,
    "qwen3_moe": lambda: transformers_model("qwen3_moe"),
    "deepseek_v3": lambda: transformers_model("deepseek_v3"),
}


@pytest.mark.parametrize(
    "name, both_ways",
    [
        *((name, "counterparts") for name in MODELS),
        ("deepseek_v3", "interpreted"),  # has one layer with experts
        *(pytest.param(name, "interpreted", marks=pytest.mark.slow) for name in ("deepseek_moe", "qwen3_moe")),
    ],
    indirect=["both_ways"],
)
def test_logits_and_all_gradients_are_those_of_the_eager_experts(both_ways, name):  # noqa: F811
    model = MODELS[name]().train()
    expected = trained_step(named(model, "eager"))
    assert_same_steps(trained_step(named(model, "triton")), expected)


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("counterparts", "fresh_compiler")
@pytest.mark.parametrize("adapt", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain", "adapted"])
def test_a_training_step_compiles_to_one_graph(adapt):
    model = tiny_model(tiny_config("v1", num_hidden_layers=1, first_k_dense_replace=0))
    model = (adapted(model) if adapt else named(model, "triton")).train()
    expected = trained_step(model)
    assert_same_steps(trained_step(model, backend="aot_eager"), expected)


@pytest.mark.usefixtures("counterparts")
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_changes_no_gradient(use_reentrant):
    model = adapted(base_model())
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    actual = gradients(model)
    assert all(torch.equal(actual[name], gradient) for name, gradient in expected.items())


def adapted(model, implementation: str = "triton"):
    """With two adapters of different ranks, both active."""
    model = get_peft_model(model, register_expert_lora(make_config(), model))
    model.add_adapter("second", make_config(r=2, lora_alpha=3))
    model.base_model.set_adapter(["default", "second"])
    randomize(model, seed=1)
    return named(model, implementation).eval()


class Calls(TorchDispatchMode):
    """Counts those of the operator."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.deepseek_moe.experts.default
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("counterparts")
def test_adapted_experts_give_what_sorted_mm_gives():
    ours, other = adapted(base_model()), adapted(base_model(), "sorted_mm")
    assert len(wrappers(ours)) == 4
    with Calls() as calls:
        assert_same(logits(ours), logits(other))
    assert calls.count == 2  # layers with experts
    assert_same_gradients(ours, other)
    with ours.disable_adapter(), other.disable_adapter():
        assert_same(logits(ours), logits(other))
        assert_same(logits(ours), logits(base_model()))
    assert_same(logits(ours.merge_and_unload()), logits(other))


def other_activation(experts) -> None:
    experts.act_fn = ACT2FN["gelu"]


def other_gate(experts) -> None:
    experts._apply_gate = MethodType(lambda experts, gate_up: gate_up.chunk(2, dim=-1)[0], experts)


def biases(experts) -> None:
    experts.has_bias = True


def four_bits(experts) -> None:
    del experts.down_proj
    experts.down_proj = quantize(torch.randn(8, 32, 16))


def other_widths(experts) -> None:
    experts.gate_up_proj, experts.down_proj = (nn.Parameter(torch.randn(8, *shape)) for shape in ((48, 32), (32, 24)))


@pytest.mark.parametrize(
    "change, reason",
    [
        (other_activation, 'the activation is GELUActivation, not SiLU; use "sorted_mm" or "grouped_mm"'),
        (other_gate, 'DeepseekMoeExperts multiplies gate and up in its own way; use "sorted_mm" or "grouped_mm"'),
        (biases, 'DeepseekMoeExperts has has_bias=True; use "grouped_mm"'),
        (four_bits, 'down_proj is in four bits (NF4Weight); use "sorted_mm"'),
        (nn.Module.double, 'gate_up_proj is torch.float64, not float16, bfloat16 or float32; use "sorted_mm"'),
        (
            other_widths,
            "down_proj has shape [8, 32, 24], whose last dimension is no multiple of 16; "
            'use "sorted_mm" or "grouped_mm"',
        ),
    ],
)
def test_experts_of_another_kind_are_refused_in_one_line(change, reason):
    experts = make_experts()
    experts.config._experts_implementation = "triton"
    change(experts)
    with pytest.raises(ValueError) as error:
        experts(*make_inputs("uniform", 2))
    assert str(error.value) == f'experts_implementation="triton": {reason}'


WITHOUT = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch
from modeling_deepseek_moe import DeepseekMoeConfig
from modeling_deepseek_moe.experts import DeepseekMoeExperts
assert "modeling_deepseek_moe.kernels.triton.launch" not in sys.modules
experts = DeepseekMoeExperts(DeepseekMoeConfig(hidden_size=32, moe_intermediate_size=16, n_routed_experts=8))
experts.config._experts_implementation = "sorted_mm"
inputs = torch.randn(2, 32), torch.tensor([[0, 1], [1, 2]]), torch.rand(2, 2)
with torch.no_grad():
    experts(*inputs)
experts.config._experts_implementation = "triton"
for _ in range(2):
    try:
        experts(*inputs)
    except ValueError as error:
        print(error)
    del sys.modules["triton"], sys.modules["modeling_deepseek_moe.kernels.triton.launch"]
    del sys.modules["modeling_deepseek_moe.kernels.triton.experts"]
"""


def test_where_triton_cannot_run_the_error_says_why_and_all_else_works():
    """First without Triton, then with it, but on CPU and not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", WITHOUT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        'experts_implementation="triton": Triton is not installed; use "sorted_mm" or "grouped_mm"',
        'experts_implementation="triton": Triton\'s kernels run on CUDA devices, the tensors are on cpu; '
        'use "sorted_mm" or "grouped_mm"',
    ]
