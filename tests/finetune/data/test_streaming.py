"""Rows that are read while training."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import counting_rows, stopped_at, tiny_tokenizer, tiny_values, write_jsonl

from modeling_deepseek_moe.finetune.data import rows as data
from modeling_deepseek_moe.finetune.errors import UserError
from modeling_deepseek_moe.finetune.recipe.load import make_recipe
from modeling_deepseek_moe.finetune.train import one_run as train


def values(folder, base, **overrides):
    """Of a run on 30 streamed rows, of which the fourth is bad."""
    folder.mkdir(exist_ok=True)
    made = tiny_values(folder, base, **{"streaming": True, "bad_rows": "skip", **overrides})
    rows = counting_rows("prompt", 30)
    write_jsonl(folder / "rows.jsonl", [*rows[:3], {"txt": "w1"}, *rows[3:]])
    held_out = write_jsonl(folder / "held_out.jsonl", counting_rows("prompt", 4))
    return made | {"eval_data": str(held_out)}


@pytest.mark.parametrize(
    "packing", [pytest.param(False, id="rows"), pytest.param(True, id="packed", marks=pytest.mark.slow)]
)
def test_a_stopped_run_on_a_stream_ends_as_if_it_had_not_been(tmp_path, base, packing):
    """Eight steps of six rows are more than one pass over the rows."""

    def recipe(name):
        more = {"packing": packing, "max_length": 16, "training.max_steps": 8, "training.save_steps": 6}
        return make_recipe(values(tmp_path / name, base, **more))

    at_once = train.run(recipe("a"))
    with stopped_at(7):
        train.run(recipe("b"))
    in_two = train.run(recipe("b"))
    same = ("steps", "train_loss", "eval_loss_before", "eval_loss_after")
    assert in_two["resumed_from"] == "checkpoint-6"
    assert [at_once[key] for key in same] == [in_two[key] for key in same]
    one, other = (load_file(tmp_path / name / "run" / "adapter" / "adapter_model.safetensors") for name in "ab")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (at_once["train_rows"], at_once["eval_rows"]) == (None, 4)
    report = json.loads((tmp_path / "b" / "run" / "data_report.json").read_text())["data"]
    # Read several times, counted once.
    assert (report["read"], report["kept"], report["complete"]) == (31, 30, True)
    assert report["left_out"]["of no known kind"]["first"] == ["line 4"]


def test_rows_are_read_as_they_are_needed(tmp_path, base):
    recipe = make_recipe(values(tmp_path, base))
    write_jsonl(tmp_path / "rows.jsonl", [*counting_rows("text", 3000), {"txt": "the last"}])
    (tmp_path / "run").mkdir()
    rows = data.recipe_rows(recipe, tiny_tokenizer(), tmp_path / "run")
    first = [row["input_ids"] for row, _ in zip(rows.train, range(5), strict=False)]
    again = [row["input_ids"] for row, _ in zip(rows.train, range(5), strict=False)]
    in_order = [data.encode(row, tiny_tokenizer(), 32)[0] for row in counting_rows("text", 5)]
    assert first == again and first != in_order
    report = rows.callbacks[0].reports["data"]
    assert 1000 <= report.read < 1100 and not report.complete and not report.left_out


def test_a_bad_row_of_a_stream_ends_the_run_by_its_line(tmp_path, base):
    recipe = make_recipe(values(tmp_path, base, bad_rows="stop"))
    with pytest.raises(UserError, match=r"rows.jsonl, line 4: a row has .*this one has txt \(`bad_rows: skip`"):
        train.run(recipe)


def test_a_stream_without_a_good_row_does_not_run_forever(tmp_path, base):
    recipe = make_recipe(values(tmp_path, base))
    write_jsonl(tmp_path / "rows.jsonl", [{"txt": "w1"}])
    with pytest.raises(UserError, match="has no rows to learn from"):
        train.run(recipe)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"eval_data": None}, "cannot hold out .* give `eval_data`, or set `eval_fraction: 0`"),
        ({"training.max_steps": -1}, "set `training.max_steps`"),
        ({"training.dataloader_num_workers": 2}, "remove `training.dataloader_num_workers`"),
        ({"dpo.beta": 0.1}, "`streaming` does not work with the `dpo` keys"),
    ],
    ids=["nothing held out", "no end", "workers", "preferences"],
)
def test_what_a_stream_cannot_do_is_said(tmp_path, base, changes, message):
    with pytest.raises(UserError, match=message):
        make_recipe({**values(tmp_path, base), **changes})
    make_recipe({**values(tmp_path, base), "eval_data": None, "eval_fraction": 0})
