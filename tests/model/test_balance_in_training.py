"""The balance losses inside a model: which tokens and sequences count, however the batch is padded, packed or cut."""

import pytest
import torch
from tiny import tiny_ids, tiny_model, v1_config, v2_config, v3_config
from transformers import Trainer, TrainerCallback, TrainingArguments

from modeling_deepseek_moe.balancing import (
    communication_balance_loss,
    device_balance_loss,
    expert_balance_loss,
    sequence_balance_loss,
)

# Coefficients large enough that every loss shows in every gradient.
CONFIGS = {
    "v1": lambda **fields: v1_config(
        **{"aux_loss_alpha": 0.5, "device_loss_alpha": 0.3, "balance_devices": 2, **fields}
    ),
    "v2": lambda **fields: v2_config(
        **{"aux_loss_alpha": 0.5, "device_loss_alpha": 0.3, "communication_loss_alpha": 0.2, **fields}
    ),
    "v3 with two MTP layers": lambda **fields: v3_config(
        **{"aux_loss_alpha": 0.5, "mtp_loss_weight": 0.3, "num_nextn_predict_layers": 2, **fields}
    ),
}
every_config = pytest.mark.parametrize("config_of", CONFIGS.values(), ids=CONFIGS.keys())
LENGTHS = [12, 5, 9, 12, 3, 7, 11, 6]


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_gradients(found, expected):
    """Sums of float32 terms in another order, at most 1e-6 of the largest gradient apart."""
    assert found.keys() == expected.keys()
    scale = max(tensor.abs().max() for tensor in expected.values())
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6 * scale.item(), msg=name)


def rows_of(config) -> list[dict[str, list[int]]]:
    """Eight rows of unequal length, the first two tokens of each without a target."""
    rows = []
    for seed, length in enumerate(LENGTHS):
        ids = tiny_ids(config, batch=1, length=length, seed=seed)[0].tolist()
        rows.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]], "attention_mask": [1] * length})
    return rows


def padded(rows) -> dict[str, torch.Tensor]:
    length = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    return {
        name: torch.tensor([row[name] + [value] * (length - len(row[name])) for row in rows])
        for name, value in fill.items()
    }


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
@every_config
def test_any_cut_of_a_padded_batch_gives_the_same_loss_and_gradients(config_of, micro_batch):
    model = tiny_model(config_of()).train()
    rows = rows_of(model.config)
    items = torch.tensor(sum(len(row["labels"]) - 2 for row in rows))
    whole = model(**padded(rows), num_items_in_batch=items)
    whole.loss.backward()
    expected = gradients(model)
    model.zero_grad()
    total = mtp = 0.0
    for start in range(0, len(rows), micro_batch):
        part = model(**padded(rows[start : start + micro_batch]), num_items_in_batch=items)
        part.loss.backward()
        total += part.loss.item()
        mtp += 0.0 if part.mtp_loss is None else part.mtp_loss.item()
    assert total == pytest.approx(whole.loss.item(), rel=1e-6)
    assert_equal_gradients(gradients(model), expected)
    if whole.mtp_loss is not None:
        assert mtp == pytest.approx(whole.mtp_loss.item(), rel=1e-6)


class KeepGradients(TrainerCallback):
    """Keeps the gradients that the optimizer is about to use."""

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.gradients = gradients(model)


@pytest.mark.parametrize("precision", ["float32", "bf16 autocast"])
@every_config
def test_trainer_accumulation_1x8_and_8x1_give_the_same_gradients(config_of, precision, tmp_path):
    found = []
    for batch_size, steps in ((8, 1), (1, 8)):
        model = tiny_model(config_of())
        keep = KeepGradients()
        arguments = TrainingArguments(
            output_dir=tmp_path,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=steps,
            max_steps=1,
            max_grad_norm=1e9,
            bf16=precision != "float32",
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        rows = rows_of(model.config)
        Trainer(model=model, args=arguments, train_dataset=rows, data_collator=padded, callbacks=[keep]).train()
        found.append(keep.gradients)
    if precision == "float32":
        assert_equal_gradients(*found)
        return
    # bf16 products of other shapes round otherwise: 3 digits.
    for name, tensor in found[0].items():
        cosine = torch.nn.functional.cosine_similarity(tensor.flatten(), found[1][name].flatten(), dim=0)
        assert cosine > 0.99 or tensor.abs().max() < 1e-4, (name, cosine.item())


@every_config
def test_a_packed_row_has_the_balance_loss_of_its_sequences_alone(config_of):
    config = config_of(num_nextn_predict_layers=0)
    model = tiny_model(config).train()
    rows = [tiny_ids(config, batch=1, length=length, seed=length) for length in (5, 9, 3)]
    packed = torch.cat(rows, dim=1)
    positions = torch.cat([torch.arange(row.shape[1]) for row in rows]).unsqueeze(0)
    alone = torch.stack([model(row, labels=row).aux_loss for row in rows])
    together = model(packed, position_ids=positions, labels=packed).aux_loss
    # Without a count of targets sequences weigh alike. Sums in another order: 1e-5.
    torch.testing.assert_close(together, alone.mean(), rtol=1e-5, atol=0)
    assert together.item() != pytest.approx(model(packed, labels=packed).aux_loss.item(), rel=1e-3)


def test_packing_gives_the_gradients_of_the_same_sequences_padded():
    config = CONFIGS["v3 with two MTP layers"]()
    model = tiny_model(config).train()
    rows = rows_of(config)
    items = torch.tensor(sum(len(row["labels"]) - 2 for row in rows))
    model(**padded(rows), num_items_in_batch=items).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    joined = {name: torch.tensor([sum((row[name] for row in rows), [])]) for name in ("input_ids", "labels")}
    positions = torch.cat([torch.arange(length) for length in LENGTHS]).unsqueeze(0)
    model(**joined, position_ids=positions, num_items_in_batch=items).loss.backward()
    assert_equal_gradients(gradients(model), expected)


@pytest.mark.parametrize("side", ["left", "right"])
@every_config
def test_t12_padding_counts_only_where_the_config_says_so(config_of, side):
    ids = tiny_ids(config_of(), batch=2, length=8)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    if side == "right":
        mask = mask.flip(1)
    losses = {}
    for counts_padding in (False, True):
        model = tiny_model(config_of(num_nextn_predict_layers=0, aux_loss_counts_padding=counts_padding)).train()
        routes = []
        for layer in model.model.layers[1:]:
            layer.mlp.gate.register_forward_hook(lambda module, args, output, routes=routes: routes.append(output))
        found = model(ids, attention_mask=mask, labels=ids).aux_loss
        counted = None if counts_padding else mask
        losses[counts_padding] = sum(
            layer_loss(model.config, router_logits.unflatten(0, ids.shape), index.unflatten(0, ids.shape), counted)
            for router_logits, _, index in routes
        )
        torch.testing.assert_close(found, losses[counts_padding])
    assert losses[True].item() != pytest.approx(losses[False].item(), rel=1e-3)


def layer_loss(config, router_logits, index, counted):
    """What the coefficients of `CONFIGS` ask of one layer."""
    if config.topk_method == "noaux_tc":
        return sequence_balance_loss(router_logits, config.num_experts_per_tok, 0.5, counted)
    devices = 2 if config.topk_method == "greedy" else 4
    loss = expert_balance_loss(router_logits, index, 0.5, attention_mask=counted)
    loss = loss + device_balance_loss(router_logits, index, 0.3, devices, attention_mask=counted)
    if config.topk_method == "group_limited_greedy":
        loss = loss + communication_balance_loss(router_logits, index, 0.2, devices, 2, attention_mask=counted)
    return loss


def test_a_sigmoid_router_can_have_the_expert_loss_of_its_biased_choice():
    config = v3_config(
        num_hidden_layers=2, num_nextn_predict_layers=0, aux_loss_alpha=0.5, aux_loss_type="expert", seq_aux=False
    )
    model = tiny_model(config).train()
    routes = []
    model.model.layers[1].mlp.gate.register_forward_hook(lambda module, args, output: routes.append(output))
    ids = tiny_ids(config)
    found = model(ids, labels=ids).aux_loss
    router_logits, _, index = (tensor.unflatten(0, ids.shape) for tensor in routes[0])
    scores = router_logits.sigmoid()
    share = torch.nn.functional.one_hot(index, 8).sum(2).float().mean((0, 1)) * 8 / 3
    mean_score = (scores / scores.sum(-1, keepdim=True)).mean((0, 1))
    torch.testing.assert_close(found, 0.5 * (share * mean_score).sum())


def test_gradient_checkpointing_changes_no_balance_gradient():
    config = CONFIGS["v2"]()
    found = []
    for checkpointing in (False, True):
        model = tiny_model(config).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**padded(rows_of(config))).loss.backward()
        found.append(gradients(model))
    assert_equal_gradients(*found)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"aux_loss_type": "device"}, "aux_loss_type='device' is not one of 'auto', 'expert', 'sequence'"),
        ({"device_loss_alpha": -0.1}, "device_loss_alpha=-0.1 must be a number of at least 0"),
        ({"balance_devices": 3}, "n_routed_experts=8 is not divisible among balance_devices=3"),
        ({"balance_devices": 0}, "n_routed_experts=8 is not divisible among balance_devices=0"),
        ({"communication_loss_alpha": 0.1, "balance_devices": 2}, "n_group=4, balance_devices=2"),
        ({"communication_loss_alpha": 0.1, "topk_method": "greedy"}, "topk_method='greedy'"),
    ],
    ids=["unknown loss", "negative", "ragged devices", "no devices", "devices without a limit", "no group limit"],
)
def test_a_balance_field_that_cannot_be_is_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        v2_config(**fields)


def test_the_balance_fields_are_saved_and_read(tmp_path):
    fields = {"aux_loss_type": "sequence", "device_loss_alpha": 0.05, "communication_loss_alpha": 0.02}
    v2_config(**fields, aux_loss_counts_padding=True).save_pretrained(tmp_path)
    config = type(v2_config()).from_pretrained(tmp_path)
    assert {name: getattr(config, name) for name in fields} == fields
    assert config.aux_loss_counts_padding and config.uses_sequence_loss
