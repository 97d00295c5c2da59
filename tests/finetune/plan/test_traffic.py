"""Bytes that ranks send: computed, against what a real step of each layout calls on torch's fake backend."""

from collections import Counter

import pytest
import torch
from tiny import tiny_config, tiny_ids, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.distributed import expert_parallel

from modeling_deepseek_moe.finetune.plan.memory import MemoryPlan
from modeling_deepseek_moe.finetune.plan.ranks import Layout, spread_by, spreads_of
from modeling_deepseek_moe.finetune.plan.traffic import traffic_of
from modeling_deepseek_moe.finetune.recipe.load import make_recipe

KINDS = {"all_reduce": "all-reduce", "allreduce_": "all-reduce", "_allgather_base_": "all-gather"}
KINDS |= {"all_gather_into_tensor": "all-gather", "_reduce_scatter_base_": "reduce-scatter"}
KINDS |= {"all_to_all_single": "all-to-all"}
LAYOUTS = [
    Layout(shard=4),
    Layout(shard=4, ep=2),
    Layout(shard=4, ep=4),
    Layout(shard=2, replicate=2),
    Layout(shard=4, replicate=2, ep=2),
    Layout(shard=2, replicate=3, ep=2),
    Layout(tp=2),
    Layout(tp=2, shard=2, replicate=2),
    Layout(shard=16, ep=4),
    Layout(shard=16, ep=2, inside_experts=True),
]


class Collectives(TorchDispatchMode):
    """Bytes by kind: of the larger of what goes in and what comes out."""

    def __init__(self):
        super().__init__()
        self.payload = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        found = operation(*args, **(kwargs or {}))
        name = operation.__name__.partition(".")[0]
        if operation.namespace in ("c10d", "_c10d_functional") and name in KINDS:
            self.payload[KINDS[name]] += max(map(size, (*args, found)))
        return found


def size(value) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes
    return sum(map(size, value)) if isinstance(value, list | tuple) else 0


def counted(config, layout: Layout, checkpointing: bool, monkeypatch, autocast: bool = False) -> dict[str, int]:
    """What one forward and backward pass of the real model calls, as rank 0 of the layout."""
    # Nobody else sends; as many rows come as go.
    monkeypatch.setattr(expert_parallel, "all_to_all_single", lambda out, given, group=None: out.copy_(given))
    ids = tiny_ids(config)
    with spread_by(layout) as spread:
        model = spread(tiny_model(config)).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        with Collectives() as collectives, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model(ids, labels=ids).loss.backward()
    return dict(collectives.payload)


def computed(config, layout: Layout, checkpointing: bool, autocast: bool = False):
    values = {"model": "m", "data": "d", "output_dir": "o", "dtype": "float32", "max_length": 12}
    recipe = make_recipe({**values, "training.per_device_train_batch_size": 2, "training.bf16": autocast})
    plan = MemoryPlan(config, recipe)
    return traffic_of(spreads_of(config, recipe, layout), layout, plan.config, plan.shape(), checkpointing)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda each: each.name)
@pytest.mark.parametrize("lineage", ["v1", "v2_lite", "v3"])
def test_payloads_are_those_of_a_real_step(lineage, layout, checkpointing, monkeypatch):
    config = tiny_config(lineage)
    expected = counted(config, layout, checkpointing, monkeypatch)
    found = {each.kind: each.payload for each in computed(config, layout, checkpointing)}
    assert found == expected


@pytest.mark.parametrize("layout", LAYOUTS[:4] + LAYOUTS[-1:], ids=lambda each: each.name)
def test_payloads_under_autocast_are_those_of_a_real_step(layout, monkeypatch):
    config = tiny_config("v3")
    expected = counted(config, layout, False, monkeypatch, autocast=True)
    assert {each.kind: each.payload for each in computed(config, layout, False, autocast=True)} == expected


def test_rings_send_all_but_their_own_part_and_leave_the_machine_where_they_must():
    config = tiny_config("v3", n_routed_experts=64, n_group=1, topk_group=1)
    of = {
        layout: {each.kind: each for each in computed(config, layout, False)}
        for layout in (Layout(shard=8), Layout(shard=16), Layout(shard=8, replicate=2), Layout(shard=16, ep=16))
    }
    for layout, found in of.items():
        gathered = found["all-gather"]
        assert gathered.sent == pytest.approx(gathered.payload * (layout.shard - 1) / layout.shard, abs=200)
    # A ring through two machines crosses over once for each of them, for the eight of it.
    inside, through, replicas, _ = of.values()
    assert inside["all-gather"].outside == 0
    assert through["all-gather"].outside == pytest.approx(through["all-gather"].sent / 8, abs=200)
    # Every rank has its replica in the other machine.
    assert replicas["all-reduce"].outside == replicas["all-reduce"].sent == replicas["all-reduce"].payload
    exchanged = of[Layout(shard=16, ep=16)]["all-to-all"]
    assert exchanged.outside == exchanged.payload // 2 and exchanged.sent == exchanged.payload * 15 // 16


@pytest.mark.parametrize("layout", LAYOUTS[:5], ids=lambda each: each.name)
def test_payloads_with_multi_token_prediction_are_those_of_a_real_step_but_for_a_norm(layout, monkeypatch):
    config = tiny_config("v3", mtp_loss_weight=0.3)
    expected = counted(config, layout, True, monkeypatch)
    found = {each.kind: each.payload for each in computed(config, layout, True)}
    assert expected["all-gather"] - found["all-gather"] == 4 * config.hidden_size  # which is used twice
    assert found | {"all-gather": 0} == expected | {"all-gather": 0}
