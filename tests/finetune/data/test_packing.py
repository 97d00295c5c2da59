"""Several rows in one sequence: what is learned is what the rows would teach alone."""

import json

import pytest
import torch
from datasets import Dataset
from tiny import tiny_config, tiny_model
from tiny_run import stopped_at, tiny_base, tiny_tokenizer, tiny_values

from modeling_deepseek_moe.finetune.data.batches import Collator
from modeling_deepseek_moe.finetune.data.chat import IGNORED
from modeling_deepseek_moe.finetune.data.packing import pack
from modeling_deepseek_moe.finetune.data.rows import recipe_rows
from modeling_deepseek_moe.finetune.recipe.load import make_recipe
from modeling_deepseek_moe.finetune.train import one_run as train

LENGTHS = (5, 9, 2, 12, 3, 7, 16, 1, 4)


def rows_of(lengths=LENGTHS):
    """Rows of different tokens; every third token is not learned, and with some the first one is."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 90, (length,), generator=generator).tolist() for length in lengths]
    labels = [[IGNORED if i % 3 == 1 else token for i, token in enumerate(row)] for row in ids]
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


def documents(sequence):
    """The rows in a packed sequence: where positions start again."""
    starts = [i for i, position in enumerate(sequence["position_ids"]) if position == 0]
    ends = [*starts[1:], len(sequence["position_ids"])]
    return [sequence["input_ids"][start:end] for start, end in zip(starts, ends, strict=True)]


def test_every_row_is_packed_once_and_whole():
    rows, packed = rows_of(), pack(rows_of(), 16)
    assert sorted(row for sequence in packed for row in documents(sequence)) == sorted(rows["input_ids"])
    assert all(len(sequence["input_ids"]) <= 16 for sequence in packed)
    assert len(packed) == 4  # 59 tokens need at least four
    for sequence in packed:
        for row in documents(sequence):
            assert len(row) in LENGTHS
    learned = [label for labels in packed["labels"] for label in labels if label != IGNORED]
    # All but the first label of a row, from which the loss is shifted away in a row alone, too.
    assert sorted(learned) == sorted(label for labels in rows["labels"] for label in labels[1:] if label != IGNORED)
    assert packed[:] == pack(rows_of(), 16)[:]


@pytest.mark.parametrize("lineage", ["v1", "v2_lite", "v3"])
def test_a_packed_batch_has_loss_logits_and_gradients_of_its_rows_alone(lineage):
    """With the balance loss per sequence and, for v3, the multi-token loss."""
    losses = {"aux_loss_alpha": 0.1, "seq_aux": True, "mtp_loss_weight": 0.5 if lineage == "v3" else 0.0}
    model = tiny_model(tiny_config(lineage, pad_token_id=2, **losses)).train()
    collate = Collator(tiny_tokenizer())
    batch = collate(list(pack(rows_of(), 16)))
    assert batch["input_ids"].shape == (1, sum(LENGTHS)) and "attention_mask" not in batch
    targets = (batch["labels"] != IGNORED).sum()

    def gradients():
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return found

    output = model(**batch, num_items_in_batch=targets)
    output.loss.backward()
    packed, total, alone = gradients(), 0.0, {}
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    for row in rows_of():
        one = model(**collate([row]), num_items_in_batch=targets)
        total += one.loss.item()
        if one.loss.requires_grad:
            one.loss.backward()
        start = next(
            s for s in starts if batch["input_ids"][0, s : s + len(row["input_ids"])].tolist() == row["input_ids"]
        )
        alone[start] = one.logits[0].detach()
    assert sorted(alone) == starts
    # float32: sums of up to 59 terms in another order, on logits of about 10.
    torch.testing.assert_close(
        torch.cat([alone[start] for start in starts]), output.logits[0].detach(), atol=1e-4, rtol=1e-4
    )
    assert output.loss.item() == pytest.approx(total, rel=1e-5)
    separate = gradients()
    assert packed.keys() == separate.keys()
    for name, gradient in separate.items():
        torch.testing.assert_close(packed[name], gradient, rtol=1e-3, atol=1e-5 * gradient.abs().max().item() + 1e-8)


def test_rows_that_are_not_packed_are_still_padded():
    batch = Collator(tiny_tokenizer())(list(rows_of((2, 3))))
    assert batch["input_ids"].shape == (2, 3) and "position_ids" not in batch


def test_rows_to_measure_on_are_not_packed(tmp_path):
    """So that their loss compares with other runs'."""
    rows = recipe_rows(make_recipe(tiny_values(tmp_path, tmp_path, packing=True)), tiny_tokenizer(), tmp_path)
    assert (len(rows.eval), rows.eval.column_names) == (6, ["input_ids", "labels"])
    assert len(rows.train) == 5 and "position_ids" in rows.train.column_names  # 18 rows of 7 tokens, four in 32


def test_a_stopped_packed_run_ends_as_if_it_had_not_been(tmp_path):
    base = tiny_base(tmp_path / "base")

    def recipe(folder):
        (tmp_path / folder).mkdir(exist_ok=True)
        values = tiny_values(tmp_path / folder, base, packing=True, max_length=16)
        return make_recipe(values | {"training.per_device_train_batch_size": 2, "training.max_steps": 4})

    at_once = train.run(recipe("a"))
    with stopped_at(3):
        train.run(recipe("b"))
    in_two = train.run(recipe("b"))
    same = ("steps", "train_loss", "eval_loss_before", "eval_loss_after", "train_rows", "packed_into")
    assert in_two["resumed_from"] == "checkpoint-2"
    assert [at_once[key] for key in same] == [in_two[key] for key in same]
    assert at_once["eval_loss_after"] < at_once["eval_loss_before"]
    # Rows of 7 tokens, two in 16.
    assert (at_once["train_rows"], at_once["packed_into"], at_once["eval_rows"]) == (18, 9, 6)
    report = json.loads((tmp_path / "b" / "run" / "data_report.json").read_text())
    assert (report["train_rows"], report["packed_into"]) == (18, 9)
