"""The experts' Triton kernels as one operator: results, every gradient, what it keeps and what it asks for.

The eager experts with `W + B A` written out, in float64, are the reference. Interpreted on CPU a pass takes seconds,
so most of what the operator itself does is shown with the launchers' plain PyTorch counterparts, to which the
launchers are compared beside them; whole models are in `test_triton_models`.
"""

import pytest
import torch
from adapted_experts import (
    EXPERTS,
    HIDDEN,
    RANKS,
    SLOTS,
    WIDTH,
    LargestTensor,
    assert_same,
    cast,
    gradients,
    make_adapters,
    make_experts,
    make_inputs,
    reference,
)
from plain_launchers import both_ways, counterparts, launched  # noqa: F401
from torch._subclasses import FakeTensorMode
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from modeling_deepseek_moe.kernels.triton import experts as triton_experts
from modeling_deepseek_moe.kernels.triton import weight_gradient
from modeling_deepseek_moe.kernels.triton.experts import triton_experts as product

BOTH = RANKS["both"]
SEVERAL = RANKS["several, of different ranks"]


CASES = {
    "trained": ("uniform", 23, "no adapter", True),
    "trained, one token": ("some served elsewhere", 1, "no adapter", True),
    "trained, with adapters": ("some served elsewhere", 23, "several, of different ranks", True),
    "adapters": ("uniform", 23, "several, of different ranks", False),
    "adapters, one token": ("two experts empty", 1, "several, of different ranks", False),
    "adapters of gate_up": ("all tokens to three experts", 40, "gate_up alone", False),
    "adapters of down": ("some served elsewhere", 23, "down alone", False),
}
FAST = "trained, with adapters"


def exact_gradients(experts, inputs, adapters) -> list[torch.Tensor]:
    """In float64."""
    hidden_states, index, weights = inputs
    doubled = [tensor.detach().double().requires_grad_() for tensor in (hidden_states, weights)]
    copy = make_experts(trained=any(weight.requires_grad for weight in experts.parameters())).double()
    copy.load_state_dict(experts.state_dict())
    return gradients(reference, copy, (doubled[0], index, doubled[1]), cast(adapters, torch.float64))


def check(experts, inputs, adapters) -> None:
    expected = exact_gradients(experts, inputs, adapters)
    for actual, wanted in zip(gradients(product, experts, inputs, adapters), expected, strict=True):
        assert_same(actual, wanted.to(actual.dtype))


@pytest.mark.parametrize(
    "case, both_ways",
    [
        *((case, "counterparts") for case in CASES),
        (FAST, "interpreted"),
        *(pytest.param(case, "interpreted", marks=pytest.mark.slow) for case in CASES if case != FAST),
    ],
    indirect=["both_ways"],
)
def test_outputs_and_all_gradients_are_those_of_the_adapted_weights(both_ways, case):  # noqa: F811
    """40 tokens to each of three experts: two full tiles of rows and a ragged one."""
    routing, tokens, ranks, trained = CASES[case]
    torch.manual_seed(0)
    check(make_experts(trained=trained), make_inputs(routing, tokens), make_adapters(RANKS[ranks]))


def test_one_expert_may_serve_all_tokens(both_ways):  # noqa: F811
    torch.manual_seed(0)
    hidden_states, weights = torch.randn(70, HIDDEN).requires_grad_(), torch.rand(70, 1).requires_grad_()
    check(make_experts(), (hidden_states, torch.full((70, 1), 5), weights), make_adapters(BOTH))


def test_the_kernels_get_routing_weights_without_gaps():
    """Of one choice a token, they may be a column of a wider tensor."""
    index, weights = torch.randint(EXPERTS, (7, 3)), torch.rand(7, 3)
    experts = make_experts()
    prepared = triton_experts._prepared(
        torch.randn(7, HIDDEN), index[:, 1:2], weights[:, 1:2], experts.gate_up_proj, experts.down_proj
    )
    assert all(tensor.is_contiguous() for tensor in prepared) and torch.equal(prepared[2], weights[:, 1])


@pytest.mark.parametrize("tokens", [0, 4])
def test_tokens_that_other_ranks_serve_give_zeros_and_zero_gradients(both_ways, tokens):  # noqa: F811
    experts, adapters = make_experts(trained=True), make_adapters(BOTH)
    hidden_states, weights = torch.randn(tokens, HIDDEN).requires_grad_(), torch.rand(tokens, SLOTS).requires_grad_()
    inputs = (hidden_states, torch.full((tokens, SLOTS), EXPERTS), weights)
    results = gradients(product, experts, inputs, adapters)
    assert [r.shape for r in results[:3]] == [hidden_states.shape, hidden_states.shape, weights.shape]
    assert not any(result.any() for result in results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_exact_as_adapted_weights_in_it(both_ways, dtype):  # noqa: F811
    torch.manual_seed(0)
    experts, adapters = make_experts(dtype, trained=True), make_adapters(SEVERAL)
    inputs = make_inputs("some served elsewhere", 60, dtype)
    actual = gradients(product, experts, inputs, adapters)
    rebuilt = gradients(reference, experts, inputs, cast(adapters, dtype))
    exact = exact_gradients(experts, inputs, cast(adapters, dtype))
    for ours, other, wanted in zip(actual, rebuilt, exact, strict=True):
        # Both round to the dtype a handful of times, at different places: alike on average.
        assert (ours - wanted).norm() <= 1.25 * (other - wanted).norm()


@pytest.mark.usefixtures("counterparts")
def test_the_output_has_the_dtype_of_the_tokens_and_gradients_those_of_their_inputs():
    torch.manual_seed(0)
    experts, adapters = make_experts(torch.bfloat16, trained=True), make_adapters(BOTH)
    output, dx, dw, *rest = gradients(product, experts, make_inputs("uniform", 5), adapters)
    assert {output.dtype, dx.dtype, dw.dtype} == {torch.float32}
    assert [gradient.dtype for gradient in rest] == [torch.bfloat16] * 2 + [torch.float32] * 4
    # Slots are added up in float32, and that sum is not rounded again.
    assert not any(torch.equal(sums, sums.bfloat16().float()) for sums in (output, dx))


@pytest.mark.usefixtures("counterparts")
def test_autocast_changes_nothing():
    torch.manual_seed(0)
    experts, inputs, adapters = make_experts(trained=True), make_inputs("uniform", 5), make_adapters(BOTH)
    expected = gradients(product, experts, inputs, adapters)
    with torch.autocast("cpu", torch.bfloat16):
        actual = gradients(product, experts, inputs, adapters)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.usefixtures("counterparts")
def test_experts_and_factors_without_gradient_are_left_without():
    torch.manual_seed(0)
    experts, adapters = make_experts(trained=True), make_adapters(SEVERAL)
    hidden_states, index, weights = make_inputs("uniform", 5)
    expected = gradients(product, experts, (hidden_states, index, weights), adapters)
    (first, second), down = adapters["gate_up_proj"], adapters["down_proj"]
    frozen = [hidden_states, weights, experts.gate_up_proj, first.A, *(factor for part in down for factor in part[:2])]
    for tensor in frozen:
        tensor.requires_grad_(False)
    output = product(experts, hidden_states, index, weights, *adapters.values())
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(2)))
    assert all(tensor.grad is None for tensor in frozen)
    trained = (experts.down_proj, first.B, second.A, second.B)
    for tensor, wanted in zip(trained, (expected[4], *expected[6:9]), strict=True):
        assert_same(tensor.grad, wanted)


@pytest.mark.parametrize("trained, adapted, count", [(False, False, 0), (True, False, 2), (False, True, 4)])
def test_gradients_that_nobody_asks_for_are_not_computed(trained, adapted, count, launched):  # noqa: F811
    experts, adapters = make_experts(trained=trained), make_adapters(BOTH)
    for factor in (factor for part in adapters.values() for adapter in part for factor in adapter[:2]):
        factor.requires_grad_(adapted)
    product(experts, *make_inputs("uniform", 5), *adapters.values()).sum().backward()
    assert launched.count(weight_gradient._weight_gradient_kernel) == count


@pytest.mark.usefixtures("counterparts")
def test_saved_for_the_backward_pass_are_gate_and_up_and_low_ranks_only():
    torch.manual_seed(0)
    experts, adapters, inputs = make_experts(), make_adapters(BOTH), make_inputs("uniform", 40)
    saved = {}

    def keep(tensor):
        saved[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        product(experts, *inputs, *adapters.values())
    factors = [factor for part in adapters.values() for adapter in part for factor in adapter[:2]]
    given = {tensor.data_ptr() for tensor in (*inputs, *experts.parameters(), *factors)}
    pairs = 40 * SLOTS
    assert sum(numel for pointer, numel in saved.items() if pointer not in given) == pairs * (2 * WIDTH + 4 + 4)


class Outputs(TorchDispatchMode):
    """Keeps what the operator gives."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.deepseek_moe.experts.default:
            self.sizes = [tensor.numel() for tensor in result]
        return result


@pytest.mark.usefixtures("counterparts")
def test_nothing_is_kept_where_no_gradient_is_asked_for():
    torch.manual_seed(0)
    experts, inputs = make_experts(), make_inputs("uniform", 5)
    frozen = [tensor.detach() for tensor in inputs]
    with Outputs() as outputs:
        assert product(experts, *frozen).grad_fn is None
        assert outputs.sizes == [5 * HIDDEN, 0, 0, 0]
        with torch.no_grad():
            output = product(experts, *inputs, *(adapters := make_adapters(BOTH)).values())
        assert outputs.sizes == [5 * HIDDEN, 0, 0, 0]
        assert torch.equal(product(experts, *inputs, *adapters.values()), output)
        assert outputs.sizes == [5 * HIDDEN, *(5 * SLOTS * width for width in (2 * WIDTH, 4, 4))]


def operator_inputs(save: bool = True) -> tuple:
    experts, adapters = make_experts(trained=save), make_adapters(SEVERAL)
    factors = [factor.requires_grad_(save) for part in adapters.values() for adapter in part for factor in adapter[:2]]
    scalings = [adapter.scaling for part in adapters.values() for adapter in part]
    inputs = make_inputs("some served elsewhere", 6)
    inputs = [tensor if save else tensor.detach() for tensor in inputs]
    return *inputs, experts.gate_up_proj, experts.down_proj, factors, scalings, 2, save


def backward_inputs() -> tuple:
    inputs = operator_inputs()
    *tensors, factors, scalings, count, _ = tree_map_only(torch.Tensor, torch.Tensor.detach, inputs)
    output, *saved = torch.ops.deepseek_moe.experts(*tensors, factors, scalings, count, True)
    needs = [True] * (4 + len(factors))
    return torch.randn_like(output), *tensors, factors, scalings, count, *saved, needs


@pytest.mark.usefixtures("counterparts")
@pytest.mark.parametrize("save", [True, False], ids=["with gradients", "without"])
def test_the_operator_is_one_that_torch_accepts(save):
    """Schema, autograd registration, shapes without values, and what torch.compile makes of it."""
    torch.manual_seed(0)
    opcheck(torch.ops.deepseek_moe.experts, operator_inputs(save))


@pytest.mark.usefixtures("counterparts")
def test_so_is_the_operator_of_the_backward_pass():
    torch.manual_seed(0)
    opcheck(torch.ops.deepseek_moe.experts_backward, backward_inputs())


OPERATORS = [("experts", operator_inputs), ("experts_backward", backward_inputs)]


def body_of(name: str):
    """What the operator does, open to the modes that watch single operations."""
    return getattr(triton_experts, f"_{name}")._init_fn


@pytest.mark.parametrize("name, inputs", OPERATORS)
def test_with_frozen_weights_nothing_of_their_size_is_built(name, inputs, launched):  # noqa: F811
    *values, last = tree_map_only(torch.Tensor, torch.Tensor.detach, inputs())
    if name == "experts_backward":
        last = [needed and place not in (2, 3) for place, needed in enumerate(last)]  # all but the weights
    with LargestTensor() as largest:
        body_of(name)(*values, last)
    # The factors of all experts, whose five ranks are padded to 32 bytes.
    assert launched and largest.numel == EXPERTS * 8 * HIDDEN < EXPERTS * HIDDEN * WIDTH


@pytest.mark.parametrize("name, inputs", OPERATORS)
def test_nothing_asks_for_values_on_the_device(name, inputs, launched):  # noqa: F811
    """On tensors without values, every launch left out: an `item()`, a `bool()` or a shape by routing would raise."""
    values = tree_map_only(torch.Tensor, torch.Tensor.detach, inputs())
    expected = getattr(torch.ops.deepseek_moe, name)(*values)
    launched.clear()
    with FakeTensorMode() as mode:
        found = body_of(name)(*tree_map_only(torch.Tensor, mode.from_tensor, values))
    assert launched
    assert [(tensor.shape, tensor.dtype) for tensor in found] == [(tensor.shape, tensor.dtype) for tensor in expected]
