"""Balance losses, the bias step and load statistics against plain Python loops written from the papers' formulas."""

import math
import random

import pytest
import torch
from tiny import tiny_ids, tiny_model, v1_config, v2_config, v3_config

from modeling_deepseek_moe.balancing import (
    communication_balance_loss,
    device_balance_loss,
    expert_balance_loss,
    expert_load,
    load_entropy,
    max_violation,
    sequence_balance_loss,
    sequence_ids,
    unused_share,
    update_expert_bias,
)

BATCH, LENGTH, EXPERTS, TOP_K, ALPHA = 3, 7, 8, 2, 0.5
DEVICES, TOPK_DEVICES = 4, 2
# The losses are float32 sums of some hundred terms of order 0.1; the loops are in double precision.
RTOL = 1e-6


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(BATCH, LENGTH, EXPERTS, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def padding() -> torch.Tensor:
    """One row padded on the left, one on the right, one full."""
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[0, :3] = 0
    mask[1, 5:] = 0
    return mask


def chosen_of(scores: list[float]) -> set[int]:
    return set(sorted(range(len(scores)), key=lambda expert: -scores[expert])[:TOP_K])


def loss_of_tokens(scores: list[list[float]], chosen: list[set[int]]) -> float:
    """sum_i f_i P_i over one group of tokens (equations 12 to 14 of the DeepSeekMoE paper)."""
    total, tokens = 0.0, len(scores)
    for expert in range(EXPERTS):
        uses = sum(1 for experts in chosen if expert in experts)
        f = EXPERTS / (TOP_K * tokens) * uses
        p = sum(token[expert] for token in scores) / tokens
        total += f * p
    return total


def softmax(row: list[float]) -> list[float]:
    powers = [math.exp(value) for value in row]
    return [power / sum(powers) for power in powers]


def sigmoid(row: list[float]) -> list[float]:
    return [1 / (1 + math.exp(-value)) for value in row]


def kept(rows, mask) -> list[list]:
    """The real tokens of each sequence."""
    return [[row for row, real in zip(rows[b], mask[b], strict=True) if real] for b in range(len(rows))]


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_t12_the_expert_loss_per_sequence_is_the_papers_formula_of_each_averaged(logits, padding, padded):
    mask = padding if padded else torch.ones_like(padding)
    index = logits.topk(TOP_K, dim=-1).indices
    losses = []
    for rows in kept(logits.double().tolist(), mask.tolist()):
        losses.append(loss_of_tokens([softmax(row) for row in rows], [chosen_of(row) for row in rows]))
    loss = expert_balance_loss(logits, index, ALPHA, attention_mask=mask if padded else None)
    assert loss.item() == pytest.approx(ALPHA * sum(losses) / BATCH, rel=RTOL)


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_t12_the_expert_loss_of_the_batch_counts_all_its_tokens_as_one(logits, padding, padded):
    mask = padding if padded else torch.ones_like(padding)
    index = logits.topk(TOP_K, dim=-1).indices
    rows = sum(kept(logits.double().tolist(), mask.tolist()), [])
    expected = ALPHA * loss_of_tokens([softmax(row) for row in rows], [chosen_of(row) for row in rows])
    loss = expert_balance_loss(logits, index, ALPHA, per_sequence=False, attention_mask=mask if padded else None)
    assert loss.item() == pytest.approx(expected, rel=RTOL)
    per_sequence = expert_balance_loss(logits, index, ALPHA, attention_mask=mask if padded else None)
    assert per_sequence.item() != pytest.approx(expected, rel=1e-3), "the two ways must differ on unequal sequences"


def loss_of_devices(scores: list[list[float]], chosen: list[set[int]], communication: bool) -> float:
    """Equations 26-28 (device) or 29-31 (communication) of the V2 paper over one group of tokens."""
    total, tokens, width = 0.0, len(scores), EXPERTS // DEVICES
    for device in range(DEVICES):
        experts = set(range(device * width, (device + 1) * width))
        p = sum(token[expert] for token in scores for expert in experts) / tokens
        if communication:
            f = DEVICES / (TOPK_DEVICES * tokens) * sum(1 for used in chosen if used & experts)
        else:
            uses = sum(len(used & experts) for used in chosen)
            f = EXPERTS / (TOP_K * tokens) * uses / width
        total += f * p
    return total


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("per_sequence", [True, False], ids=["per sequence", "per batch"])
@pytest.mark.parametrize("communication", [False, True], ids=["device", "communication"])
def test_the_device_losses_are_the_papers_formulas(logits, padding, padded, per_sequence, communication):
    mask = padding if padded else torch.ones_like(padding)
    groups = kept(logits.double().tolist(), mask.tolist())
    groups = groups if per_sequence else [sum(groups, [])]
    expected = sum(
        loss_of_devices([softmax(row) for row in rows], [chosen_of(row) for row in rows], communication)
        for rows in groups
    ) / len(groups)
    function, limits = device_balance_loss, (DEVICES,)
    if communication:
        function, limits = communication_balance_loss, (DEVICES, TOPK_DEVICES)
    index = logits.topk(TOP_K, dim=-1).indices
    loss = function(logits, index, ALPHA, *limits, per_sequence, mask if padded else None)
    assert loss.item() == pytest.approx(ALPHA * expected, rel=RTOL)


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_t13_the_sequence_loss_counts_unbiased_choices_and_weighs_by_normalised_sigmoids(logits, padding, padded):
    mask = padding if padded else torch.ones_like(padding)
    losses = []
    for rows in kept(logits.double().tolist(), mask.tolist()):
        scores = [sigmoid(row) for row in rows]
        normalised = [[score / sum(row) for score in row] for row in scores]
        losses.append(loss_of_tokens(normalised, [chosen_of(row) for row in scores]))
    loss = sequence_balance_loss(logits, TOP_K, ALPHA, attention_mask=mask if padded else None)
    assert loss.item() == pytest.approx(ALPHA * sum(losses) / BATCH, rel=RTOL)


def test_t13_the_models_sequence_loss_ignores_the_bias_and_the_group_limit():
    """The bias moves the routing, and with it only the hidden states of later layers; one layer shows it alone."""
    config = v3_config(num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0, aux_loss_alpha=ALPHA)
    ids = tiny_ids(config)
    model = tiny_model(config).train()
    gate = model.model.layers[0].mlp.gate
    routes, losses = [], []
    gate.register_forward_hook(lambda module, args, output: routes.append(output[2]))
    for bias in (torch.zeros(8), torch.linspace(-3, 3, 8)):
        gate.e_score_correction_bias.copy_(bias)
        outputs = model(ids, labels=ids, output_router_logits=True)
        losses.append(outputs.aux_loss)
    assert not torch.equal(routes[0].sort().values, routes[1].sort().values)
    assert torch.equal(*losses)
    expected = sequence_balance_loss(
        outputs.router_logits[0].unflatten(0, ids.shape), config.num_experts_per_tok, ALPHA
    )
    torch.testing.assert_close(losses[0], expected)


def test_v2_counts_the_experts_its_group_limit_really_chose():
    config = v2_config(num_hidden_layers=1, first_k_dense_replace=0, aux_loss_alpha=ALPHA)
    ids = tiny_ids(config)
    model = tiny_model(config).train()
    routes = []
    model.model.layers[0].mlp.gate.register_forward_hook(lambda module, args, output: routes.append(output))
    aux_loss = model(ids, labels=ids).aux_loss
    router_logits, _, index = routes[0]
    logits, limited = router_logits.unflatten(0, ids.shape), index.unflatten(0, ids.shape)
    free = logits.topk(config.num_experts_per_tok, dim=-1).indices
    assert not torch.equal(limited.sort().values, free.sort().values), "the group limit must bind here"
    torch.testing.assert_close(aux_loss, expert_balance_loss(logits, limited, ALPHA))
    assert aux_loss.item() != pytest.approx(expert_balance_loss(logits, free, ALPHA).item(), rel=1e-4)


@pytest.mark.parametrize("per_sequence", [True, False], ids=["per sequence", "per batch"])
def test_perfect_balance_costs_exactly_alpha(per_sequence):
    """Equal logits and each expert chosen equally often: f_i = 1 and sum_i P_i = 1."""
    index = torch.arange(EXPERTS).repeat(2, TOP_K).unflatten(1, (EXPERTS, TOP_K))
    loss = expert_balance_loss(torch.zeros(2, EXPERTS, EXPERTS), index, ALPHA, per_sequence=per_sequence)
    assert loss.item() == pytest.approx(ALPHA, rel=1e-7)
    devices = device_balance_loss(torch.zeros(2, EXPERTS, EXPERTS), index, ALPHA, DEVICES, per_sequence)
    assert devices.item() == pytest.approx(ALPHA, rel=1e-7)


def test_perfect_balance_of_what_devices_receive_costs_exactly_alpha():
    """Every token goes to two devices, and every device gets half of the tokens."""
    index = torch.tensor([[[0, 2], [4, 6], [1, 3], [5, 7]]])
    loss = communication_balance_loss(torch.zeros(1, 4, EXPERTS), index, ALPHA, DEVICES, TOPK_DEVICES)
    assert loss.item() == pytest.approx(ALPHA, rel=1e-7)
    on_one_device = torch.tensor([[[0, 1], [2, 3], [4, 5], [6, 7]]])
    loss = communication_balance_loss(torch.zeros(1, 4, EXPERTS), on_one_device, ALPHA, DEVICES, TOPK_DEVICES)
    assert loss.item() == pytest.approx(ALPHA / 2, rel=1e-7)


def test_perfect_balance_of_sigmoid_scores_costs_alpha():
    """Each expert is preferred by as many tokens of the sequence as any other."""
    rows = [[4.0 if expert // TOP_K == token else -1.0 for expert in range(EXPERTS)] for token in range(4)]
    loss = sequence_balance_loss(torch.tensor([rows]), TOP_K, ALPHA)
    assert loss.item() == pytest.approx(ALPHA, rel=1e-6)


def test_all_tokens_on_the_same_experts_cost_many_times_alpha():
    logits = torch.full((1, LENGTH, EXPERTS), -20.0)
    logits[..., :TOP_K] = 20.0
    index = torch.arange(TOP_K).expand(1, LENGTH, TOP_K)
    # f = E/K on the K experts that have all the score.
    assert expert_balance_loss(logits, index, ALPHA).item() == pytest.approx(ALPHA * EXPERTS / TOP_K, rel=1e-6)
    assert sequence_balance_loss(logits, TOP_K, ALPHA).item() == pytest.approx(ALPHA * EXPERTS / TOP_K, rel=1e-6)


def test_padding_changes_neither_loss_nor_gradient(logits, padding):
    noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    other = torch.where(padding.unsqueeze(-1).bool(), logits, noise)
    for function in (
        lambda x: sequence_balance_loss(x, TOP_K, ALPHA, padding),
        lambda x: expert_balance_loss(x, x.topk(TOP_K, dim=-1).indices, ALPHA, True, padding),
        lambda x: expert_balance_loss(x, x.topk(TOP_K, dim=-1).indices, ALPHA, False, padding),
        lambda x: device_balance_loss(x, x.topk(TOP_K, dim=-1).indices, ALPHA, DEVICES, True, padding),
        lambda x: communication_balance_loss(x, x.topk(TOP_K, dim=-1).indices, ALPHA, DEVICES, 2, True, padding),
    ):
        first, second = logits.clone().requires_grad_(), other.clone().requires_grad_()
        losses = function(first), function(second)
        torch.testing.assert_close(*losses, rtol=RTOL, atol=0)
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(first.grad, second.grad, rtol=1e-5, atol=1e-8)
        assert not first.grad[padding == 0].any()


def test_a_sequence_of_padding_only_counts_for_nothing(logits, padding):
    padding[1] = 0
    rows = torch.tensor([0, 2])
    loss = sequence_balance_loss(logits, TOP_K, ALPHA, padding)
    torch.testing.assert_close(loss, sequence_balance_loss(logits[rows], TOP_K, ALPHA, padding[rows]))
    assert sequence_balance_loss(logits, TOP_K, ALPHA, torch.zeros_like(padding)).item() == 0.0


def test_gradients_follow_the_scores_and_not_the_choice(logits):
    """f is a count: only P carries gradient, so the gradient is that of alpha * sum f_i P_i with f constant."""
    leaf = logits.double().requires_grad_()
    index = logits.topk(TOP_K, dim=-1).indices
    (gradient,) = torch.autograd.grad(expert_balance_loss(leaf, index, ALPHA), leaf)
    f = torch.nn.functional.one_hot(index, EXPERTS).sum(2).double().mean(1) * EXPERTS / TOP_K
    (expected,) = torch.autograd.grad(ALPHA * (f * leaf.softmax(-1).mean(1)).sum(-1).mean(), leaf)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-8)


def test_the_sign_rule_moves_every_bias_by_the_speed_and_leaves_average_experts_alone():
    bias = torch.tensor([0.1, 0.2, -0.3, 0.0])
    counts = torch.tensor([10, 2, 6, 6])
    moved = update_expert_bias(bias, counts, speed=0.25)
    # sign(0) = 0: the third and fourth expert carry exactly the mean.
    assert torch.equal(moved, torch.tensor([0.1 - 0.25, 0.2 + 0.25, -0.3, 0.0]))
    assert torch.equal(bias, torch.tensor([0.1, 0.2, -0.3, 0.0])), "the argument is not changed"
    assert torch.equal(update_expert_bias(bias, torch.full((4,), 9), speed=0.25), bias)


def test_the_proportional_rule_moves_by_the_relative_error():
    moved = update_expert_bias(torch.zeros(4), torch.tensor([10, 2, 6, 6]), speed=0.3, rule="proportional")
    torch.testing.assert_close(moved, torch.tensor([-0.2, 0.2, 0.0, 0.0]), rtol=1e-6, atol=1e-8)
    assert not update_expert_bias(torch.zeros(4), torch.zeros(4), 0.3, rule="proportional").any()


def test_an_unknown_rule_is_named_with_the_choices():
    with pytest.raises(ValueError, match="rule='signed' is not one of 'sign', 'proportional'"):
        update_expert_bias(torch.zeros(4), torch.ones(4), 0.1, rule="signed")


def test_the_bias_stays_float32_with_integer_counts_of_any_size():
    # 2^24 + 1 tokens are not a float32 number; the direction still is right.
    moved = update_expert_bias(torch.zeros(2), torch.tensor([2**24 + 64, 2**24]), speed=0.001)
    assert moved.dtype == torch.float32
    torch.testing.assert_close(moved, torch.tensor([-0.001, 0.001]))


def test_the_bias_step_balances_a_lopsided_router():
    """Tokens whose favourite is expert 0 spread over all experts once the bias has moved (Algorithm 1)."""
    scores = torch.rand(512, EXPERTS, generator=torch.Generator().manual_seed(0))
    scores[:, 0] += 0.8
    bias, violations = torch.zeros(EXPERTS), []
    for _ in range(200):
        counts = expert_load((scores + bias).topk(TOP_K, dim=-1).indices, EXPERTS)
        violations.append(max_violation(counts).item())
        bias = update_expert_bias(bias, counts, speed=0.01)
    assert violations[0] > 2
    # One step of 0.01 moves about 1 % of the uniform scores over the threshold.
    assert max(violations[-10:]) < 0.15


def test_expert_load_counts_ids_of_any_shape_and_ignores_the_id_behind_the_last():
    index = torch.tensor([[[0, 3], [3, 1]], [[3, 0], [4, 4]]])
    assert expert_load(index, 4).tolist() == [2, 1, 0, 3]
    assert expert_load(index, 4).dtype == torch.int64
    rng = random.Random(0)
    ids = [rng.randrange(EXPERTS) for _ in range(300)]
    assert expert_load(torch.tensor(ids), EXPERTS).tolist() == [ids.count(expert) for expert in range(EXPERTS)]


def test_max_violation_is_the_relative_excess_of_the_busiest_expert():
    counts = torch.tensor([[10, 2, 6, 6], [5, 5, 5, 5], [24, 0, 0, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(max_violation(counts), torch.tensor([10 / 6 - 1, 0.0, 3.0, 0.0]))


def test_unused_share_is_the_share_of_experts_without_a_token():
    assert unused_share(torch.tensor([[3, 0, 1, 0], [1, 1, 1, 1]])).tolist() == [0.5, 0.0]


def test_sequences_begin_with_every_row_and_where_positions_start_again():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [4, 5, 6, 7, 8, 9]])
    assert sequence_ids(positions).tolist() == [[0, 0, 0, 1, 1, 2], [3, 3, 3, 3, 3, 3]]


def test_expert_load_leaves_masked_tokens_out():
    index, mask = torch.tensor([[[0, 1], [1, 2]], [[3, 1], [0, 3]]]), torch.tensor([[1, 0], [1, 1]])
    assert expert_load(index, 4, mask).tolist() == [2, 2, 0, 2]


def test_load_entropy_is_one_for_even_load_and_zero_for_one_expert():
    counts = torch.tensor([[5, 5, 5, 5], [20, 0, 0, 0], [10, 10, 0, 0]])
    torch.testing.assert_close(load_entropy(counts), torch.tensor([1.0, 0.0, 0.5]))


@pytest.mark.parametrize("seq_aux", [True, False], ids=["per sequence", "per batch"])
def test_t12_the_model_counts_as_seq_aux_says_and_leaves_padding_out(seq_aux):
    config = v1_config(aux_loss_alpha=ALPHA, seq_aux=seq_aux)
    model = tiny_model(config).train()
    ids = tiny_ids(config, batch=2, length=10)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    outputs = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), output_router_logits=True)
    expected = 0.0
    for router_logits in outputs.router_logits:
        logits = router_logits.unflatten(0, ids.shape)
        index = logits.topk(config.num_experts_per_tok, dim=-1).indices
        expected += expert_balance_loss(logits, index, ALPHA, seq_aux, mask)
    torch.testing.assert_close(outputs.aux_loss, expected)
    shorter = model(ids[1:, :6], labels=ids[1:, :6]).aux_loss
    assert shorter.item() == pytest.approx(
        model(ids[1:], attention_mask=mask[1:], labels=ids[1:]).aux_loss.item(), rel=1e-5
    )
