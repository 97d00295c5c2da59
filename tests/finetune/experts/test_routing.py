"""Sums of routing over tokens, the distance of two shares, and claimed experts."""

import pytest
import torch
from datasets import Dataset
from reference import route
from tiny import tiny_config, tiny_ids, tiny_model

from modeling_deepseek_moe.finetune.errors import UserError
from modeling_deepseek_moe.finetune.experts.routing import (
    claimed_experts,
    padded_batches,
    routing_totals,
    share_distance,
)


def rows_of_many_lengths(model):
    """Random rows of 1 to 9 tokens: batches of them need padding."""
    return [tiny_ids(model.config, 1, 1 + row % 9, seed=row)[0].tolist() for row in range(18)]


def routing_by_hand(model, rows):
    """Counts and sums of weights `[layer][expert]`, one row and one token at a time, by the papers' formulas."""
    config, inputs = model.config, {}
    layers = range(config.first_k_dense_replace, config.num_hidden_layers)
    gates = {layer: model.model.layers[layer].mlp.gate for layer in layers}
    for layer, gate in gates.items():
        gate.register_forward_pre_hook(lambda _, args, layer=layer: inputs.__setitem__(layer, args[0].double()))
    counts = torch.zeros(len(layers), config.n_routed_experts, dtype=torch.int64)
    weights = counts.double()
    for row in rows:
        with torch.no_grad():
            model.model(torch.tensor([row]))
        for i, (layer, gate) in enumerate(gates.items()):
            part = {f"mlp.gate.{name}": tensor.double() for name, tensor in gate.state_dict().items()}
            for token in inputs[layer].flatten(0, -2):
                for expert, weight in route(config.to_dict(), part, token).items():
                    counts[i, expert] += 1
                    weights[i, expert] += weight
    return counts, weights


@pytest.mark.parametrize("lineage", ["v1", "v2", "v3"])
def test_counts_and_weights_are_those_of_every_token_without_padding(lineage):
    model = tiny_model(tiny_config(lineage))
    rows = rows_of_many_lengths(model)
    totals = routing_totals(model, padded_batches(Dataset.from_dict({"input_ids": rows}), batch_size=5))
    assert totals.tokens == sum(len(row) for row in rows)
    assert totals.layers == [1, 2], "without layer 3 of V3, which is multi-token prediction"
    counts, weights = routing_by_hand(model, rows)
    assert torch.equal(totals.counts, counts)
    # The router computes in float32, the reference in float64.
    assert torch.allclose(totals.weights, weights, rtol=1e-5)
    assert torch.equal(totals.shares, counts.double() / (totals.tokens * model.config.num_experts_per_tok))


def test_totals_of_two_parts_add_up_to_those_of_the_whole():
    model = tiny_model(tiny_config("v3"))
    rows = rows_of_many_lengths(model)
    whole, one, other = (
        routing_totals(model, padded_batches(Dataset.from_dict({"input_ids": part}), batch_size=4))
        for part in (rows, rows[:7], rows[7:])
    )
    added = one + other
    assert (added.tokens, added.layers) == (whole.tokens, whole.layers)
    assert torch.equal(added.counts, whole.counts)
    assert torch.allclose(added.weights, whole.weights, rtol=1e-5), "other batches, other sums in float32"


def test_batches_hold_every_row_once_with_the_longest_first_and_report_what_is_done():
    rows = [[1, 2], [3], [4, 5, 6], [7, 8]]
    done = []
    batches = list(padded_batches(Dataset.from_dict({"input_ids": rows}), 3, lambda *new: done.append(new)))
    assert [batch["input_ids"].tolist() for batch in batches] == [[[4, 5, 6], [1, 2, 0], [7, 8, 0]], [[3]]]
    assert [batch["attention_mask"].tolist() for batch in batches] == [[[1, 1, 1], [1, 1, 0], [1, 1, 0]], [[1]]]
    assert done == [(3, 7), (1, 1)]


class Refuses(torch.nn.Module):
    def forward(self, *_, **__):
        raise AssertionError("this part has no business here")


def test_head_and_multi_token_layers_do_not_run_and_no_hook_is_left():
    model = tiny_model(tiny_config("v3"))
    model.lm_head = Refuses()
    model.model.layers[3] = Refuses()
    routing_totals(model, [{"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3)}])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_model_without_experts_or_with_broken_weights_is_refused():
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3)}
    with pytest.raises(UserError, match="has no layer with routed experts"):
        routing_totals(tiny_model(tiny_config("v3", first_k_dense_replace=3)), [batch])
    model = tiny_model(tiny_config("v3"))
    model.model.layers[1].mlp.experts.down_proj.data.fill_(float("inf"))
    with pytest.raises(UserError, match="router of layer 2 .* not finite in float32: try another dtype"):
        routing_totals(model, [batch])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_distance_is_0_for_the_same_share_and_1_for_disjoint_ones():
    same = torch.tensor([0.5, 0.5, 0.0, 0.0])
    others = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.25, 0.75], [0.25, 0.5, 0.25, 0.0]])
    assert share_distance(same, others).tolist() == [0, 1, 0.25]


@pytest.mark.parametrize(
    "shares, others, claimed",
    [
        ([[0.1, 0.4, 0.5, 0.0]], [[0.4, 0.2, 0.1, 0.3]], [2, 1]),
        ([[0.25, 0.25, 0.25, 0.25]], [[0.0, 0.0, 0.5, 0.5]], []),
        ([[0.3, 0.7, 0.0, 0.0]], [[0.16, 0.84, 0.0, 0.0]], []),
        ([[0.5, 0.5, 0.0, 0.0]], [[0.5, 0.5, 0.0, 0.0]], []),
        ([[0.6, 0.4, 0.0, 0.0], [0.4, 0.6, 0.0, 0.0]], [[0.1, 0.1, 0.4, 0.4], [0.2, 0.25, 0.25, 0.3]], [0]),
        ([[0.9, 0.1, 0.0, 0.0], [0.2, 0.8, 0.0, 0.0]], [[0.0, 0.0, 0.5, 0.5], [0.0, 0.0, 0.5, 0.5]], []),
    ],
    ids=["twice, busiest first", "no more than even", "less than twice", "the same", "other's halves", "own halves"],
)
def test_a_claimed_expert_has_more_than_the_even_share_and_twice_the_others(shares, others, claimed):
    assert claimed_experts(torch.tensor(shares), torch.tensor(others)) == claimed
