"""The product behind expert LoRA, against the eager experts with `W + B A` written out: outputs and every gradient."""

import pytest
import torch
from adapted_experts import (
    EXPERTS,
    HIDDEN,
    RANKS,
    ROUTINGS,
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
from machines import pretend
from transformers.activations import ACT2FN

from modeling_deepseek_moe.kernels.sorted import rows as sorted_rows
from modeling_deepseek_moe.kernels.sorted.experts import sorted_experts
from modeling_deepseek_moe.kernels.sorted.low_rank import Adapter


@pytest.fixture(params=["one expert after the other", "all at once"])
def every_way(request, monkeypatch):
    """The way of CUDA also runs on CPU, where nothing else chooses it."""
    if request.param == "all at once":
        monkeypatch.setattr(sorted_rows, "grouped", lambda device: True)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("tokens", [1, 23])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_outputs_and_all_gradients_are_those_of_the_adapted_weights(every_way, routing, tokens, ranks, trained):
    torch.manual_seed(0)
    experts, adapters, inputs = (
        make_experts(trained=trained),
        make_adapters(RANKS[ranks]),
        make_inputs(routing, tokens),
    )
    expected = gradients(reference, experts, inputs, adapters)
    for actual, wanted in zip(gradients(sorted_experts, experts, inputs, adapters), expected, strict=True):
        assert_same(actual, wanted)
    with torch.no_grad():
        assert_same(sorted_experts(experts, *inputs, *adapters.values()), expected[0])


@pytest.mark.parametrize("tokens", [0, 4])
def test_tokens_that_other_ranks_serve_give_zeros_and_zero_gradients(every_way, tokens):
    experts, adapters = make_experts(), make_adapters(RANKS["both"])
    hidden_states, weights = torch.randn(tokens, HIDDEN).requires_grad_(), torch.rand(tokens, SLOTS).requires_grad_()
    inputs = (hidden_states, torch.full((tokens, SLOTS), EXPERTS), weights)
    results = gradients(sorted_experts, experts, inputs, adapters)
    assert [r.shape for r in results[:3]] == [hidden_states.shape, hidden_states.shape, weights.shape]
    assert not any(result.any() for result in results)


def test_gradients_are_those_of_finite_differences():
    torch.manual_seed(0)
    experts, adapters = make_experts(torch.float64), make_adapters(RANKS["both"], torch.float64)
    hidden_states, index, weights = make_inputs("two experts empty", 3, torch.float64)
    factors = [factor for part in adapters.values() for adapter in part for factor in adapter[:2]]

    def output(hidden_states, weights, *factors):
        gate_up, down = (Adapter(*factors[i : i + 2], 0.7) for i in (0, 2))
        return sorted_experts(experts, hidden_states, index, weights, [gate_up], [down])

    inputs = (hidden_states, weights.detach().double().requires_grad_(), *factors)
    assert torch.autograd.gradcheck(output, inputs, fast_mode=True)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("tokens", [1, 211])
def test_bfloat16_is_as_exact_as_adapted_weights_in_bfloat16(every_way, tokens, ranks):
    """211 tokens give most experts a number of rows that is filled up."""
    torch.manual_seed(0)
    experts, adapters = make_experts(torch.bfloat16), make_adapters(RANKS[ranks])
    inputs = make_inputs("uniform", tokens, torch.bfloat16)
    exact_inputs = (
        inputs[0].detach().double().requires_grad_(),
        inputs[1],
        inputs[2].detach().double().requires_grad_(),
    )
    actual = gradients(sorted_experts, experts, inputs, adapters)
    rebuilt = gradients(reference, experts, inputs, cast(adapters, torch.bfloat16))
    exact = gradients(reference, experts.double(), exact_inputs, cast(adapters, torch.float64))
    for ours, other, wanted in zip(actual, rebuilt, exact, strict=True):
        # Both round to 2^-9 a handful of times, at different places: alike on average, and one token is no average.
        slack = 2**-6 * wanted.norm() if tokens == 1 else 0
        assert (ours - wanted).norm() <= 1.25 * (other - wanted).norm() + slack


@torch.no_grad()
def test_bfloat16_slots_are_added_up_in_float32_and_rounded_once(every_way):
    torch.manual_seed(0)
    experts, adapters = make_experts(torch.bfloat16), make_adapters(RANKS["both"]).values()
    hidden_states, weights = torch.randn(300, HIDDEN).bfloat16(), torch.rand(300, EXPERTS)
    index = torch.rand(300, EXPERTS).topk(EXPERTS).indices
    together = sorted_experts(experts, hidden_states, index, weights, *adapters)
    slots = [(index[:, [k]], weights[:, [k]]) for k in range(EXPERTS)]
    apart = sum(sorted_experts(experts, hidden_states.float(), *slot, *adapters) for slot in slots)
    exact = reference(experts.float(), hidden_states.float(), index, weights, *adapters)
    # One rounding of the sum adds 4 to 5 % to the error of its terms; rounding weights or sums on the way, over 10 %.
    assert (together.float() - exact).norm() <= 1.07 * (apart - exact).norm()


def test_the_output_has_the_dtype_of_the_tokens_and_gradients_those_of_their_inputs():
    torch.manual_seed(0)
    experts, adapters = make_experts(torch.bfloat16), make_adapters(RANKS["both"])
    inputs = make_inputs("uniform", 5)
    output, *rest = gradients(sorted_experts, experts, inputs, adapters)
    assert output.dtype == torch.float32
    assert {gradient.dtype for gradient in rest} == {torch.float32}


def test_experts_and_factors_without_gradient_are_left_without():
    torch.manual_seed(0)
    experts, adapters = make_experts(), make_adapters(RANKS["several, of different ranks"])
    hidden_states, index, weights = make_inputs("uniform", 5)
    expected = gradients(sorted_experts, experts, (hidden_states, index, weights), adapters)
    adapters["gate_up_proj"][0].A.requires_grad_(False)
    for adapter in adapters["down_proj"]:
        for factor in adapter[:2]:
            factor.requires_grad_(False)
    inputs = (hidden_states.detach(), index, weights.detach())
    output = sorted_experts(experts, *inputs, *adapters.values())
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(2)))
    (first, second), down = adapters["gate_up_proj"], adapters["down_proj"]
    for actual, wanted in zip([first.B.grad, second.A.grad, second.B.grad], expected[4:7], strict=True):
        assert_same(actual, wanted)
    without = [first.A, *(factor for adapter in down for factor in adapter[:2]), *inputs, *experts.parameters()]
    assert all(tensor.grad is None for tensor in without)


@pytest.mark.parametrize("activation", ["gelu", "relu2"])
def test_other_activations_are_differentiated_too(activation):
    torch.manual_seed(0)
    experts, adapters, inputs = make_experts(), make_adapters(RANKS["both"]), make_inputs("uniform", 9)
    experts.act_fn = ACT2FN[activation]
    expected = gradients(reference, experts, inputs, adapters)
    for actual, wanted in zip(gradients(sorted_experts, experts, inputs, adapters), expected, strict=True):
        assert_same(actual, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_of_the_size_of_the_experts_weights_is_built(every_way, dtype):
    """With few tokens and a small rank, the weights of a single expert are larger than all else."""
    torch.manual_seed(0)
    experts, adapters = make_experts(dtype), make_adapters({"gate_up_proj": [1], "down_proj": [1]})
    inputs = make_inputs("uniform", 4, dtype)
    with LargestTensor() as largest:
        gradients(sorted_experts, experts, inputs, adapters)
    # The largest: gate and up of 12 pairs, each filled up to 16 rows where an expert is a product of its own, or the
    # factors of all experts, their rank padded to 16 bytes where they are not.
    assert 0 < largest.numel <= EXPERTS * 8 * 2 * WIDTH < experts.down_proj.numel()
    with LargestTensor() as largest:
        gradients(reference, experts, inputs, cast(adapters, dtype))
    assert largest.numel >= experts.gate_up_proj.numel()


def test_half_precision_products_come_in_few_sizes_on_cpu(monkeypatch):
    """oneDNN prepares itself anew for each: 1024 prepared products are kept, of 14 sizes a layer and row count."""
    pretend(monkeypatch, torch.bfloat16)
    counts = range(1, 4097)
    filled = [sorted_rows.filled(count, torch.bfloat16) for count in counts]
    assert len(set(filled)) < 1024 // 14
    assert all(count <= rows < 1.25 * count + 16 for count, rows in zip(counts, filled, strict=True))
    for dtype in (torch.float32, torch.float16):  # which oneDNN does not multiply here
        assert [sorted_rows.filled(count, dtype) for count in counts] == [*counts]


def test_saved_for_the_backward_pass_are_gate_and_up_and_low_ranks_only():
    torch.manual_seed(0)
    experts, adapters, inputs = make_experts(), make_adapters(RANKS["both"]), make_inputs("uniform", 40)
    saved = {}

    def keep(tensor):
        saved[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        sorted_experts(experts, *inputs, *adapters.values())
    factors = [factor for part in adapters.values() for adapter in part for factor in adapter[:2]]
    given = {tensor.data_ptr() for tensor in (*inputs, *experts.parameters(), *factors)}
    pairs = 40 * SLOTS
    assert sum(numel for pointer, numel in saved.items() if pointer not in given) == pairs * (2 * WIDTH + 4 + 4)
