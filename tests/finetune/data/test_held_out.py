"""Held out are documents: no part of one that is learned is measured on."""

import datasets
import pytest
from tiny_run import tiny_tokenizer, tiny_values, write_jsonl

from modeling_deepseek_moe.finetune.data.held_out import hold_out
from modeling_deepseek_moe.finetune.data.rows import load_data, recipe_rows
from modeling_deepseek_moe.finetune.recipe.load import make_recipe


def documents(count: int, words: int) -> list[dict[str, str]]:
    """Texts that each repeat a word of their own."""
    return [{"text": " ".join([f"w{number}"] * words)} for number in range(count)]


def words_of(rows) -> set[int]:
    return {token for row in rows for token in row["input_ids"]} - {0, 1}


def rows_of(tmp_path, rows, **overrides):
    values = tiny_values(tmp_path, tmp_path, **{"max_length": 6, "long_rows": "split", **overrides})
    write_jsonl(tmp_path / "rows.jsonl", rows)
    (tmp_path / "run").mkdir(exist_ok=True)
    return recipe_rows(make_recipe(values), tiny_tokenizer(), tmp_path / "run")


@pytest.mark.parametrize("packing", [False, True], ids=["", "packed"])
def test_no_document_is_on_both_sides(tmp_path, packing):
    rows = rows_of(tmp_path, documents(16, words=30), packing=packing)
    learned, measured = words_of(rows.train), words_of(rows.eval)
    assert not learned & measured
    # A quarter of 16 documents, each of which makes seven rows.
    assert (len(learned), len(measured), len(rows.eval)) == (12, 4, 4 * 7)
    assert set(rows.eval.column_names) == {"input_ids", "labels"}


def test_long_and_short_documents_count_alike(tmp_path):
    rows = rows_of(tmp_path, [*documents(20, words=3), {"text": " ".join(["w70"] * 500)}], eval_fraction=0.1)
    assert len(words_of(rows.eval)) == 2 and not words_of(rows.train) & words_of(rows.eval)


def test_of_one_document_nothing_is_held_out_and_that_is_said(tmp_path, capsys):
    rows = rows_of(tmp_path, documents(1, words=300))
    assert rows.eval is None and len(rows.train) > 50
    said = " ".join(capsys.readouterr().out.split())
    assert f"{tmp_path / 'rows.jsonl'} has one document, so none is held out: give `eval_data`" in said


def test_a_file_to_measure_on_is_split_and_used_whole(tmp_path):
    held_out = write_jsonl(tmp_path / "held_out.jsonl", documents(2, words=30))
    rows = rows_of(tmp_path, documents(16, words=30), eval_data=str(held_out))
    assert (len(words_of(rows.train)), len(words_of(rows.eval))) == (16, 2)
    assert set(rows.train.column_names) == set(rows.eval.column_names) == {"input_ids", "labels"}


def test_rows_that_are_not_split_are_held_out_as_ever(tmp_path):
    """The same rows in the same order as by `train_test_split` alone, so that earlier runs can be made again."""
    data = datasets.Dataset.from_dict({"input_ids": [[number] for number in range(100)]})
    expected = data.train_test_split(test_size=5, seed=3)
    train, test = hold_out(data, 0.05, 3, "rows")
    assert (train["input_ids"][:], test["input_ids"][:]) == tuple(expected[side]["input_ids"][:] for side in expected)


def test_parts_can_be_loaded_without_a_recipe(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", documents(3, words=30))
    data = load_data(str(path), "train", tiny_tokenizer(), 6, tmp_path / "cache", long_rows="split")
    assert data.column_names == ["input_ids", "labels"] and len(data) == 3 * 7
