"""The demo's task, and the demo that fine-tunes the shipped base on it."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_deepseek_moe.finetune.demo import task as demo_task
from modeling_deepseek_moe.finetune.demo.one_demo import base_folder, run_demo
from modeling_deepseek_moe.finetune.errors import UserError


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(base_folder())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(base_folder(), dtype=torch.float32).eval()


def test_no_word_is_both_learned_and_asked():
    split = demo_task.split_items(2000)
    learned, asked = ({item["metadata"]["word"].lower() for item in part} for part in split)
    assert (len(learned), len(asked)) == (2000, demo_task.HELD_OUT_ITEMS)
    assert not learned & asked
    assert split.held_out == demo_task.split_items(10).held_out


def test_answers_are_judged_by_the_tasks_own_scorer():
    items = demo_task.split_items(0, 2).held_out
    right = [item["answer"] for item in items]
    assert demo_task.score(items, right)[:2] == (1.0, 1.0)
    assert demo_task.score(items, [right[0], ""])[:2] == (0.5, 0.5)
    assert demo_task.score(items, [right[0][:1], ""]).mean == pytest.approx(1 / len(right[0]) / 2)


def test_a_constant_answer_scores_little_and_the_base_no_more(model, tokenizer):
    split = demo_task.split_items(2000)
    assert demo_task.constant_baseline(split).mean < 0.25
    assert demo_task.ask(model, tokenizer, split.held_out[:64]).mean < 0.2


def test_a_real_hub_without_a_token_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("modeling_deepseek_moe.finetune.demo.one_demo.get_token", lambda: None)
    with pytest.raises(UserError, match="no token to write to 'me/model': run `hf auth login`"):
        run_demo(tmp_path / "demo", hub_id="me/model")
    assert not (tmp_path / "demo").exists()


@pytest.mark.slow
def test_the_demo_learns_its_task_and_the_model_survives_merging_saving_and_the_hub(tmp_path):
    result = run_demo(tmp_path / "demo")
    assert result["after"]["score"] > 0.6
    assert result["after"]["score"] > result["before"]["score"] + 0.3
    assert result["after"]["score"] > result["baseline"]["score"] + 0.3
    assert result["reloaded"] == result["after"] == result["pulled"]
    assert result["seconds"] < 300
    for key in ("adapter", "model", "loss_curve", "hub"):
        assert (tmp_path / "demo") in Path(result[key]).parents and Path(result[key]).exists()
