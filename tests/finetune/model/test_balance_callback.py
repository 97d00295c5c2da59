"""The bias step: once per optimizer step, after it, from the counts of the whole batch, and nothing else moves a bias.

Biases are float32 numbers of about 0.02 that move by 0.01: two roundings, 1e-7, where a sum is computed in another
order; equal where the same operations ran.
"""

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from peft import LoraConfig, get_peft_model
from tiny import tiny_ids, tiny_model, v1_config
from tiny_trainer import biases, padded_rows, trainer_of, training_model, whole_rows
from transformers import DataCollatorWithFlattening, TrainerCallback

from modeling_deepseek_moe import DeepseekMoeForCausalLM
from modeling_deepseek_moe.finetune.model.balance import BalanceExperts
from modeling_deepseek_moe.finetune.model.lora import known_warnings, lora_config

SPEED = 0.01
ROUNDING = 1e-7


class Record(TrainerCallback):
    """`events` of a run: name, biases, and what each router chose `[tokens, K]` in training since the last one."""

    def __init__(self, model):
        self.model, self.events = model, []
        gates = [module for module in model.modules() if hasattr(module, "e_score_correction_bias")]
        self.chosen = [[] for _ in gates]
        for chosen, gate in zip(self.chosen, gates, strict=True):
            gate.register_forward_hook(self.keep(chosen))
        names = {"step_begin": "begin", "substep_end": "substep", "optimizer_step": "optimizer", "step_end": "end"}
        for event, name in names.items():
            setattr(self, f"on_{event}", lambda *_, name=name, **__: self.record(name))

    @staticmethod
    def keep(chosen):
        return lambda gate, _, output: chosen.append(output[2]) if gate.training else None

    def record(self, event):
        self.events.append((event, biases(self.model), [torch.cat(c) if c else None for c in self.chosen]))
        for chosen in self.chosen:
            chosen.clear()


def moved_by_hand(counts: torch.Tensor) -> torch.Tensor:
    return SPEED * torch.sign(counts.float().mean(dim=-1, keepdim=True) - counts)


def count(chosen: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([torch.bincount(ids.flatten(), minlength=8) for ids in chosen])


def test_biases_move_at_optimizer_steps_only_by_the_sum_of_all_micro_batches(tmp_path):
    """Two epochs of six micro-batches: steps of four, and of the two that are left."""
    model = training_model()
    record = Record(model)
    options = {"gradient_accumulation_steps": 4, "num_train_epochs": 2}
    trainer_of(model, whole_rows(model, 12), tmp_path, [BalanceExperts(model, SPEED), record], **options).train()
    micro_batches, before = [], record.events[0][1]
    steps = []
    for event, now, chosen in record.events:
        if event == "end":
            steps.append(len(micro_batches))
            expected = moved_by_hand(sum(micro_batches))
            torch.testing.assert_close(now - before, expected, atol=ROUNDING, rtol=0)
            assert not torch.equal(expected, moved_by_hand(micro_batches[-1]))
            micro_batches, before = [], now
            continue
        assert torch.equal(now, before), f"the biases moved before {event}"
        if event in ("substep", "optimizer"):
            micro_batches.append(count(chosen))
    assert steps == [4, 2, 4, 2] and torch.equal(biases(model), before)


def test_padding_moves_no_bias(tmp_path):
    model = training_model(mtp_loss_weight=0.0)
    record, before = Record(model), biases(model)
    rows = padded_rows(model, 4)
    options = {"gradient_accumulation_steps": 2, "max_steps": 1}
    trainer_of(model, rows, tmp_path, [BalanceExperts(model, SPEED), record], **options).train()
    real = torch.stack([row["attention_mask"] for row in rows]).bool().flatten()
    chosen = [event[2] for event in record.events if event[0] in ("substep", "optimizer")]
    whole = [torch.cat([part[layer] for part in chosen]) for layer in (0, 1)]
    with_padding, expected = (moved_by_hand(count(ids)) for ids in (whole, [ids[real] for ids in whole]))
    assert not torch.equal(expected, with_padding)
    torch.testing.assert_close(biases(model)[:2] - before[:2], expected, atol=ROUNDING, rtol=0)


def test_packed_rows_count_every_token_of_every_sequence(tmp_path):
    """Positions that start again, and no attention mask."""
    model = training_model(mtp_loss_weight=0.0)
    record, before = Record(model), biases(model)
    rows = [{"input_ids": ids[: 3 + 2 * row].tolist()} for row, ids in enumerate(tiny_ids(model.config, 4, 10))]
    options = {"per_device_train_batch_size": 4, "max_steps": 1, "data_collator": DataCollatorWithFlattening()}
    trainer_of(model, rows, tmp_path, [BalanceExperts(model, SPEED), record], **options).train()
    chosen = next(chosen for event, _, chosen in record.events if event == "optimizer")[:2]
    assert chosen[0].shape == (3 + 5 + 7 + 9, 3)
    torch.testing.assert_close(biases(model)[:2] - before[:2], moved_by_hand(count(chosen)), atol=ROUNDING, rtol=0)
    assert not torch.equal(moved_by_hand(count(chosen)), moved_by_hand(count([ids[:3] for ids in chosen])))


def test_evaluation_moves_no_bias(tmp_path):
    found = []
    for evaluated in (False, True):
        model = training_model()
        options = {"eval_dataset": whole_rows(model, 40, seed=1), "eval_strategy": "steps", "eval_steps": 1}
        options |= {"eval_on_start": True, "per_device_eval_batch_size": 40}
        balancer = BalanceExperts(model, SPEED)
        options = options if evaluated else {}
        trainer = trainer_of(model, whole_rows(model, 6), tmp_path, [balancer], max_steps=3, **options)
        trainer.train()
        found.append(biases(model))
    assert sum("eval_loss" in row for row in trainer.state.log_history) == 4
    assert torch.equal(*found)


def test_a_plain_loop_ends_with_the_trainers_biases(tmp_path):
    one, other = training_model(), training_model()
    rows = whole_rows(one, 12)
    trainer = trainer_of(one, rows, tmp_path, [BalanceExperts(one, SPEED)], max_steps=6, max_grad_norm=0)
    trainer.train()

    before = biases(other)
    balancer = BalanceExperts(other, SPEED)
    optimizer = torch.optim.SGD([p for p in other.parameters() if p.requires_grad], lr=0.1)
    for start in range(0, 12, 2):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (12 - start) / 12  # the Trainer's linear schedule
        ids = torch.stack([row["input_ids"] for row in rows[start : start + 2]])
        other(input_ids=ids, labels=ids, num_items_in_batch=torch.tensor(18)).loss.backward()
        optimizer.step()
        balancer.step()
        optimizer.zero_grad()
    assert torch.equal(biases(other), biases(one)) and not torch.equal(biases(other), before)
    torch.testing.assert_close(other.lm_head.weight, one.lm_head.weight, atol=1e-6, rtol=1e-5)


def test_a_step_that_the_loss_scaler_skips_moves_nothing_and_its_counts_are_forgotten():
    model = training_model()
    balancer = BalanceExperts(model, SPEED)
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    optimizer = AcceleratedOptimizer(sgd, device_placement=False, scaler=torch.amp.GradScaler("cpu", init_scale=8.0))
    first, second = (tiny_ids(model.config, seed=seed) for seed in (0, 1))
    start = biases(model)

    def step(ids, overflow):
        optimizer.scaler.scale(model(ids, labels=ids).loss).backward()
        if overflow:
            model.lm_head.weight.grad[0, 0] = torch.inf
        optimizer.step()
        assert optimizer.step_was_skipped is overflow
        balancer.on_step_end(None, None, None, optimizer=optimizer)
        optimizer.zero_grad()

    step(first, overflow=True)
    assert torch.equal(biases(model), start)
    step(second, overflow=False)
    alone = training_model()
    other = BalanceExperts(alone, SPEED)
    alone(second, labels=second)
    other.step()
    assert torch.equal(biases(model), biases(alone)) and not torch.equal(biases(model), start)


def test_the_proportional_rule_moves_each_bias_by_its_share_of_the_error():
    model = training_model()
    before = biases(model)
    record = Record(model)
    balancer = BalanceExperts(model, SPEED, rule="proportional")
    ids = tiny_ids(model.config)
    model(ids, labels=ids)
    record.record("forward")
    balancer.step()
    counts = count(record.events[0][2]).float()
    mean = counts.mean(dim=1, keepdim=True)
    torch.testing.assert_close(biases(model) - before, SPEED * (mean - counts) / mean, atol=ROUNDING, rtol=0)
    with pytest.raises(ValueError, match="rule='signs' is not one of 'sign', 'proportional'"):
        BalanceExperts(model, SPEED, rule="signs").step()


@pytest.mark.parametrize("weight", [0.0, 0.3], ids=["idle", "trained"])
def test_an_mtp_module_is_balanced_only_where_it_trains(weight, tmp_path):
    model = training_model(mtp_loss_weight=weight)
    before = biases(model)
    trainer_of(model, whole_rows(model, 4), tmp_path, [BalanceExperts(model, SPEED)], max_steps=2).train()
    moved = (biases(model) - before).abs().amax(dim=1)
    assert (moved[:2] > 0.5 * SPEED).all()
    assert (moved[2] > 0.5 * SPEED).item() is (weight > 0) and (weight > 0 or moved[2] == 0)


def test_a_model_without_a_bias_is_refused_and_keeps_no_hook():
    model = tiny_model(v1_config())
    with pytest.raises(ValueError, match="moves the routers' e_score_correction_bias, which this model has not"):
        BalanceExperts(model, SPEED)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("kind", ["attention", "routed_experts", "router", "all", "router trained whole"])
def test_a_model_with_adapters_is_balanced_as_without(kind):
    """New adapters add zero."""
    plain, model = training_model(), training_model()
    whole = LoraConfig(r=2, target_modules=["o_proj"], modules_to_save=["gate"])
    with known_warnings():
        adapted = get_peft_model(model, whole if "whole" in kind else lora_config(model, [kind], r=2)).train()
    balancers = BalanceExperts(plain, SPEED), BalanceExperts(adapted, SPEED)
    for seed in range(2):
        for one, balancer in zip((plain, adapted), balancers, strict=True):
            ids = tiny_ids(plain.config, seed=seed)
            one(input_ids=ids, labels=ids)
            balancer.step()
    found = [router.e_score_correction_bias for router in balancers[1].counter.routers.values()]
    assert torch.equal(torch.stack(found), biases(plain))


def test_a_callback_made_before_the_adapters_balances_what_trains(tmp_path):
    """As with trainers that put the adapters on themselves."""
    model = training_model()
    balancer = BalanceExperts(model, SPEED)
    with known_warnings():
        config = LoraConfig(r=2, target_modules=["o_proj"], modules_to_save=["gate"])
        adapted = get_peft_model(model, config)
    trainer_of(adapted, whole_rows(model, 4), tmp_path, [balancer], max_steps=2).train()
    gate = model.model.layers[1].mlp.gate
    trained, original = gate.modules_to_save["default"], gate.original_module
    moved = (trained.e_score_correction_bias - original.e_score_correction_bias).abs().max()
    assert moved > 0.5 * SPEED


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half()], ids=["bfloat16", "half"])
def test_t19_the_bias_is_float32_through_casts_save_and_load_and_moves_there(cast, tmp_path):
    model = cast(training_model())
    before = biases(model)
    balancer = BalanceExperts(model, 0.001)
    ids = tiny_ids(model.config)
    model(ids, labels=ids).loss.backward()
    balancer.step()
    moved = biases(model)
    assert moved.dtype == torch.float32 and (moved - before).abs().max() == pytest.approx(0.001, abs=ROUNDING)
    assert not torch.equal(moved.to(model.dtype).float(), moved), "half precision could not hold it"
    model.save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, "auto"):
        loaded = DeepseekMoeForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        assert biases(loaded).dtype == torch.float32 and torch.equal(biases(loaded), moved)


def test_t19_mixed_precision_of_accelerate_keeps_and_moves_the_bias_in_float32(tmp_path):
    model = training_model()
    before = biases(model)
    trainer = trainer_of(model, whole_rows(model, 2), tmp_path, [BalanceExperts(model, 0.001)], max_steps=1, bf16=True)
    trainer.train()
    assert trainer.accelerator.mixed_precision == "bf16"
    moved = biases(model) - before
    assert biases(model).dtype == torch.float32
    # A bias of 0.02 in bfloat16 would be off by up to 0.00006.
    assert ((moved.abs() - 0.001).abs() < ROUNDING).logical_or(moved == 0).all() and moved.any()


def test_a_bias_that_something_rounded_is_refused():
    """FSDP of version 1 casts buffers in place."""
    model = training_model()
    balancer = BalanceExperts(model, 0.001)
    bias = model.model.layers[2].mlp.gate.e_score_correction_bias
    bias.data = bias.to(torch.bfloat16)
    with pytest.raises(ValueError, match="of layer 2 is torch.bfloat16, .*FSDP of version 1"):
        balancer.step()


def test_t27_no_optimizer_and_no_weight_decay_moves_the_bias(tmp_path):
    model = training_model()
    before = biases(model)
    names = {name for name, _ in model.named_parameters()}
    assert not any("bias" in name for name in names)
    options = {"max_steps": 3, "weight_decay": 0.5, "learning_rate": 0.1, "optim": "adamw_torch"}
    trainer = trainer_of(model, whole_rows(model, 6), tmp_path, [], **options)
    trainer.train()
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    assert torch.equal(biases(model), before) and before.abs().min() > 0
    BalanceExperts(model, SPEED)
    assert {name for name, _ in model.named_parameters()} == names


def test_a_resumed_run_ends_with_the_biases_of_one_that_was_not_interrupted(tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    found = []
    for checkpoint in (None, str(tmp_path / "checkpoint-2")):
        model = training_model()
        trainer = trainer_of(model, whole_rows(model, 8), tmp_path, [BalanceExperts(model, SPEED)], **options)
        trainer.train(resume_from_checkpoint=checkpoint)
        found.append(biases(model))
    assert torch.equal(*found)


def test_training_leaves_no_hook_and_begins_again_from_zero(tmp_path):
    model = training_model()
    balancer = BalanceExperts(model, SPEED)
    trainer = trainer_of(model, whole_rows(model, 2), tmp_path, [balancer], max_steps=1, learning_rate=0.0)
    expected = training_model()
    other = BalanceExperts(expected, SPEED)
    ids = torch.stack([row["input_ids"] for row in whole_rows(model, 2)])
    for _ in range(2):
        model(tiny_ids(model.config, batch=40, seed=3))  # of no step
        trainer.train()
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        expected(ids, labels=ids)
        other.step()
    assert torch.equal(biases(model), biases(expected))
