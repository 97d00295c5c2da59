"""Counting tokens an expert: which forward passes and which tokens count, whatever is around the model."""

import copy

import pytest
import torch
from one_rank import under_ddp
from peft import LoraConfig, get_peft_model
from tiny import CONFIG_OF_LINEAGE, tiny_ids, tiny_model, v1_config, v2_config, v3_config

from modeling_deepseek_moe.finetune.model.counting import LoadCounter
from modeling_deepseek_moe.finetune.model.lora import WORDS, known_warnings, lora_config


def mtp_model():
    """MoE layers 1 and 2, and layer 3, the MTP module, which runs in training with labels."""
    return tiny_model(v3_config(mtp_loss_weight=0.3)).train()


def counts_by_hand(model, counter, **inputs) -> torch.Tensor:
    """What a forward pass adds, from the router's own output, all tokens."""
    found = torch.zeros(len(counter.routers), model.config.n_routed_experts, dtype=torch.int64)

    def add(row, output):
        found[row] += torch.bincount(output[2].flatten(), minlength=8)

    handles = [
        router.register_forward_hook(lambda _, args, output, row=row: add(row, output))
        for row, router in enumerate(counter.routers.values())
    ]
    model(**inputs)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("lineage", CONFIG_OF_LINEAGE)
def test_every_layers_counts_are_its_routers_choices(lineage):
    model = tiny_model(CONFIG_OF_LINEAGE[lineage]()).train()
    counter = LoadCounter(model)
    ids = tiny_ids(model.config)
    expected = counts_by_hand(model, counter, input_ids=ids)
    counts = counter.take()
    assert list(counter.blocks) == list(counter.routers) == [1, 2] + ([3] if lineage == "v3" else [])
    assert counts.dtype == torch.int64 and torch.equal(counts, expected)
    assert (counts[:2].sum(dim=1) == ids.numel() * model.config.num_experts_per_tok).all()
    assert counts[2:].sum() == 0, "without labels the MTP module does not run"


def test_an_mtp_module_counts_the_positions_it_runs_over():
    model = mtp_model()
    counter = LoadCounter(model)
    ids = tiny_ids(model.config, batch=2, length=12)
    model(ids, labels=ids)
    assert counter.take().sum(dim=1).tolist() == [2 * 12 * 3, 2 * 12 * 3, 2 * 11 * 3]


def test_taking_clears_and_calls_add_up():
    model = mtp_model()
    counter = LoadCounter(model)
    first, second = (tiny_ids(model.config, seed=seed) for seed in (0, 1))
    model(first)
    alone = counter.take()
    model(second)
    other = counter.take()
    assert not torch.equal(alone, other)
    model(first)
    model(second)
    assert torch.equal(counter.take(), alone + other)
    assert counter.take().sum() == 0
    model(first)
    counter.drop()
    assert counter.take().sum() == 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(side):
    model = mtp_model()
    counter = LoadCounter(model)
    ids = tiny_ids(model.config, batch=3, length=12)
    expected = 0
    mask = torch.ones_like(ids)
    for row, length in enumerate((12, 7, 4)):
        kept = slice(12 - length, 12) if side == "left" else slice(length)
        mask[row] = 0
        mask[row, kept] = 1
        model(ids[row : row + 1, kept])
        expected = expected + counter.take()
    model(ids, attention_mask=mask)
    counts = counter.take()
    assert torch.equal(counts, expected)
    assert counts[0].sum() == 3 * (12 + 7 + 4)


def test_a_mask_of_one_call_is_not_the_next_ones():
    model = mtp_model()
    counter = LoadCounter(model)
    ids = tiny_ids(model.config)
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    model(ids, attention_mask=mask)
    counter.take()
    model(ids)
    assert counter.take()[0].sum() == ids.numel() * 3


def test_training_and_evaluation_are_counted_apart():
    model = mtp_model()
    counter = LoadCounter(model)
    ids = tiny_ids(model.config)
    model.train()(ids)
    assert [counter.take(training)[0].sum().item() for training in (True, False)] == [ids.numel() * 3, 0]
    model.eval()(ids[:1])
    assert [counter.take(training)[0].sum().item() for training in (True, False)] == [0, ids[:1].numel() * 3]


def test_what_draws_samples_in_training_mode_trains_nothing_and_does_not_count():
    model = mtp_model()
    counter = LoadCounter(model)
    ids = tiny_ids(model.config)
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    with torch.no_grad():
        model(ids, labels=ids)
    assert counter.take().sum() == counter.take(training=False).sum() == 0


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_evaluation_counts_without_autograd_and_is_taken_outside(context):
    model = tiny_model(v2_config())
    counter = LoadCounter(model)
    ids = tiny_ids(model.config)
    with context():
        model(ids)
        model(ids)
    assert counter.take(training=False)[0].sum() == 2 * ids.numel() * 3


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_a_forward_pass_that_checkpointing_repeats_counts_once_and_a_sample_not_at_all(reentrant):
    model = mtp_model()
    counter = LoadCounter(model)
    ids = tiny_ids(model.config)
    model(ids, labels=ids).loss.backward()
    plain = counter.take()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls = []
    model.model.layers[1].mlp.gate.register_forward_hook(lambda *_: calls.append(None))
    for _ in range(2):
        with torch.no_grad():
            model(ids, labels=ids)
        model(ids, labels=ids).loss.backward()
    assert len(calls) == 6, "each router runs once without gradients and twice with them"
    assert torch.equal(counter.take(), 2 * plain)


@pytest.mark.parametrize("targets", [*WORDS, "all"])
def test_adapters_around_any_part_of_the_model_change_no_count(targets):
    model = mtp_model()
    before = LoadCounter(model)
    ids = tiny_ids(model.config)
    model(ids, labels=ids)
    expected = before.take()
    with known_warnings():
        adapted = get_peft_model(model, lora_config(model, [targets], r=4)).train()
    after = LoadCounter(adapted)
    adapted(input_ids=ids, labels=ids)
    # New adapters add zero; a counter that was there before they came goes on.
    assert torch.equal(after.take(), expected) and torch.equal(before.take(), expected)
    assert all(router.num_experts == 8 for router in after.routers.values())


def test_a_router_that_peft_trains_whole_is_the_copy_in_use():
    model = mtp_model()
    early = LoadCounter(model)
    with known_warnings():
        config = LoraConfig(r=2, target_modules=["o_proj"], modules_to_save=["gate"])
        adapted = get_peft_model(model, config).train()
    counter = LoadCounter(adapted)
    ids = tiny_ids(model.config)
    adapted(input_ids=ids)
    assert counter.take()[0].sum() == early.take()[0].sum() == ids.numel() * 3
    assert all(router.weight.requires_grad for layer, router in counter.routers.items() if layer < 3)


def test_ddp_around_the_model_changes_no_count(tmp_path):
    model = mtp_model()
    ids = tiny_ids(model.config)
    plain = LoadCounter(model)
    model(ids, labels=ids)
    expected = plain.take()

    def counted(wrapped) -> torch.Tensor:
        counter = LoadCounter(wrapped)
        wrapped(ids, labels=ids).loss.backward()
        assert list(counter.blocks) == [1, 2, 3]
        return counter.take()

    assert torch.equal(under_ddp(tmp_path, model, counted), expected)


def test_a_copy_of_a_counted_model_counts_apart():
    model = mtp_model()
    counter = LoadCounter(model)
    ids = tiny_ids(model.config)
    copy.deepcopy(model)(ids)
    assert counter.take().sum() == 0
    model(ids)
    assert counter.take()[0].sum() == ids.numel() * 3


def test_removing_ends_the_counting_and_keeps_what_was_counted():
    model = mtp_model()
    counter, other = LoadCounter(model), LoadCounter(model)
    ids = tiny_ids(model.config)
    model(ids)
    counter.remove()
    model(ids)
    assert other.take()[0].sum() == 2 * ids.numel() * 3
    assert counter.take()[0].sum() == ids.numel() * 3
    counter.remove()


def test_attaching_to_another_model_counts_there_from_zero():
    one, other = mtp_model(), mtp_model()
    counter = LoadCounter(one)
    ids = tiny_ids(one.config)
    one(ids)
    counter.attach(other)
    one(ids)
    assert counter.take().sum() == 0 and counter.blocks[1] is other.model.layers[1].mlp
    other(ids)
    assert counter.take()[0].sum() == ids.numel() * 3
    counter.attach(other)
    other(ids)
    assert counter.take()[0].sum() == ids.numel() * 3, "attached twice, counted once"


def test_a_model_without_moe_layers_is_refused_in_one_line():
    dense = tiny_model(v1_config(n_routed_experts=None, num_experts_per_tok=None))
    one_layer = tiny_model(v1_config()).model.layers[1]
    for module in (dense, one_layer):
        name = type(module).__name__
        with pytest.raises(ValueError, match=f"^{name} has no `layers` with a DeepseekMoeBlock to count in$"):
            LoadCounter(module)


def test_data_parallel_copies_are_refused_with_the_way_out():
    """nn.DataParallel needs several GPUs, so this makes the copy that it would make."""
    model = mtp_model()
    LoadCounter(model)
    replica = model.model._replicate_for_data_parallel()
    replica.embed_tokens.weight = model.model.embed_tokens.weight
    with pytest.raises(RuntimeError, match="experts cannot be counted under nn.DataParallel: .*torchrun"):
        replica(tiny_ids(model.config))
