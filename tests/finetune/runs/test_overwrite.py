"""A run that replaces another one: until its first step that one comes back, and a folder has one owner at a time."""

import contextlib
import json
import os
from pathlib import Path

import pytest
from tiny_run import stopped_at, tiny_base, tiny_values
from training_kills import KilledTraining

from modeling_deepseek_moe.finetune.errors import UserError
from modeling_deepseek_moe.finetune.recipe.load import make_recipe
from modeling_deepseek_moe.finetune.runs.folder import open_run
from modeling_deepseek_moe.finetune.train import one_run as train


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def old(tmp_path, base) -> dict[str, bytes]:
    """A finished run in `run`, and a note of its owner beside it."""
    train.run(make_recipe(tiny_values(tmp_path, base, **{"training.max_steps": 2})))
    (tmp_path / "run" / "notes.txt").write_text("mine")
    return contents(tmp_path / "run")


FAILURES = {
    "a model that is nowhere": ({"model": "/nowhere/model"}, "cannot load model"),
    "rows that are nowhere": ({"data": "nowhere.jsonl"}, "does not exist"),
    "a word that matches nothing": ({"lora.targets": ["dense_mlp"], "lora.exclude_modules": ".*"}, "`lora"),
    "an argument of the Trainer": ({"training.lr_scheduler_type": "cosin"}, "is not a valid SchedulerType"),
    "rows without a question": ({"metric": "exact_match", "kind": "text"}, "has a question and an answer"),
}


@pytest.mark.parametrize("overrides, message", FAILURES.values(), ids=FAILURES)
def test_a_run_that_cannot_begin_leaves_the_one_it_was_to_replace(tmp_path, base, old, overrides, message):
    with pytest.raises(UserError, match=message):
        train.run(make_recipe(tiny_values(tmp_path, base, seed=7, overwrite=True, **overrides)))
    assert contents(tmp_path / "run") == old


def test_a_stop_before_the_first_step_leaves_it_too_and_one_after_it_does_not(tmp_path, base, old):
    recipe = make_recipe(tiny_values(tmp_path, base, seed=7, overwrite=True))
    with stopped_at(0, "no step was made yet, and the run that was there before is kept"):
        train.run(recipe)
    assert contents(tmp_path / "run") == old
    with stopped_at(1, "no checkpoint was written yet"):
        train.run(recipe)
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert "seed: 7" in (tmp_path / "run" / "recipe.yaml").read_text()
    assert not left & {"adapter", "summary.json", "checkpoint-2", "replaced-run"} and "notes.txt" in left


def test_a_kill_at_any_moment_leaves_the_old_run_or_the_new_one(tmp_path):
    """Each disk operation between opening the folder and the first step, of a new run in the place of an old one."""
    tiny_base(tmp_path / "base")
    values = tiny_values(tmp_path, tmp_path / "base")
    run = tmp_path / "run"
    before = {"adapter/weights": "1", "checkpoint-2/optimizer.pt": "2", "summary.json": "{}", "notes.txt": "mine"}
    came_back = began = 0
    with KilledTraining() as program:
        for event in range(1000):
            if not (run / "adapter").exists():
                with contextlib.suppress(FileNotFoundError):
                    (run / "recipe.yaml").unlink()
                    (run / "before.json").unlink()
                    (run / "notes.txt").unlink()
                with open_run(make_recipe(values)) as opened:
                    opened.keep()
                for name, text in before.items():
                    (run / name).parent.mkdir(exist_ok=True)
                    (run / name).write_text(text)
            signal = program.begin({**values, "seed": 7, "overwrite": True}, event)
            assert signal in (0, 9), f"killed before operation {event}"
            # Whoever looks next finds one of the two, whole.
            try:
                with open_run(make_recipe({**values, "seed": 7})):
                    found = {name: (run / name).exists() for name in before}
                    began += 1
                    assert found == {name: name == "notes.txt" for name in before}, f"killed before operation {event}"
            except UserError as error:
                assert "holds another run (its `seed` is 42, not 7)" in str(error)
                assert not began, "the new run had begun already"
                assert {name: (run / name).read_text() for name in before} == before, f"operation {event}"
                came_back += 1
            if signal == 0:
                break
    assert began > 5 and came_back > 10


def test_a_live_folder_is_not_opened_a_second_time(tmp_path, base):
    recipe = make_recipe(tiny_values(tmp_path, base))
    with open_run(recipe) as opened:
        opened.keep()
        there = contents(tmp_path / "run")
        for overrides in ({}, {"seed": 7, "overwrite": True}):
            with pytest.raises(UserError, match=rf"is in use \(process {os.getpid()} on .*\): wait for the end"):
                train.run(make_recipe(tiny_values(tmp_path, base, **overrides)))
        assert contents(tmp_path / "run") == there
    assert not (tmp_path / "run" / "run.lock").exists()


def test_a_finished_run_started_again_leaves_everything_as_it_was(tmp_path, base, old, capsys, monkeypatch):
    summary = json.loads(old["summary.json"])
    monkeypatch.setattr(train, "load", lambda recipe: pytest.fail("the model was loaded"))
    again = train.run(make_recipe(tiny_values(tmp_path, base, **{"training.max_steps": 2})))
    assert again == summary
    assert contents(tmp_path / "run") == old
    assert "is finished: nothing is left to train" in capsys.readouterr().out


def test_what_a_finished_run_is_asked_for_later_does_not_change_what_it_says_of_its_training(tmp_path, base, old):
    summary = json.loads(old["summary.json"])
    merged = train.run(make_recipe(tiny_values(tmp_path, base, **{"training.max_steps": 2, "merge": True})))
    assert merged["saved_model"] and (tmp_path / "run" / "model" / "config.json").is_file()
    assert {**merged, "saved_model": None} == summary


def test_a_folder_that_was_moved_goes_on_where_it_is(tmp_path, base):
    """The best checkpoint is that of the folder, not the one at the path that it had."""
    best = {"training.load_best_model_at_end": True, "training.eval_strategy": "steps", "training.eval_steps": 2}
    best["training.greater_is_better"] = True  # then the first one stays the best
    values = tiny_values(tmp_path, base, **best)
    at_once = train.run(make_recipe({**values, "output_dir": str(tmp_path / "at_once")}))
    with stopped_at(5, "checkpoint-4 is saved"):
        train.run(make_recipe(values))
    os.rename(tmp_path / "run", tmp_path / "moved")
    moved = train.run(make_recipe({**values, "output_dir": str(tmp_path / "moved")}))
    assert moved["resumed_from"] == "checkpoint-4"
    assert moved["eval_loss_after"] == at_once["eval_loss_after"]
    state = json.loads((tmp_path / "moved" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "moved" / f"checkpoint-{state['best_global_step']}")
    assert state["best_global_step"] == 2
