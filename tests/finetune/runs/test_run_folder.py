"""A run that cannot begin leaves its folder as it was."""

import pytest
from tiny_run import stopped_at, tiny_base, tiny_values

from modeling_deepseek_moe.finetune.errors import UserError
from modeling_deepseek_moe.finetune.recipe.load import make_recipe
from modeling_deepseek_moe.finetune.train import one_run as train

CASES = {
    "missing rows": ({"data": "nowhere.jsonl"}, "does not exist"),
    "a truncated model": ({}, "is truncated or padded"),
    "a word that matches nothing": ({"lora.targets": ["dense_mlp", "nonsense"]}, "unknown word"),
}


@pytest.fixture
def base(tmp_path):
    return tiny_base(tmp_path / "base")


def broken(base, case):
    if case == "a truncated model":
        weights = base / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    return CASES[case]


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_cannot_begin_leaves_no_folder(case, base, tmp_path):
    overrides, message = broken(base, case)
    with pytest.raises(UserError, match=message):
        train.run(make_recipe(tiny_values(tmp_path, base, **overrides)))
    assert not (tmp_path / "run").exists()


def test_a_later_failure_keeps_what_an_earlier_run_left(base, tmp_path):
    first = make_recipe(tiny_values(tmp_path, base))
    with stopped_at(3):
        train.run(first)
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    broken(base, "a truncated model")
    with pytest.raises(UserError, match="is truncated or padded"):
        train.run(first)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before


def test_rows_that_are_not_there_are_named_before_the_model_is_loaded(tmp_path):
    (tmp_path / "no model").mkdir()
    values = tiny_values(tmp_path, tmp_path / "no model", eval_data=str(tmp_path / "rovs.jsonl"))
    with pytest.raises(UserError, match=r"rovs.jsonl' does not exist \(did you mean '.*/rows.jsonl'\?\)"):
        train.run(make_recipe(values))
