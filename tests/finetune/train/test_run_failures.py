"""What ends a run early: no room or no right to write, a full disk, a loss or a gradient that is no number."""

import collections
import errno
import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import tiny_values

from modeling_deepseek_moe.finetune.errors import RecipeError, UserError
from modeling_deepseek_moe.finetune.recipe.load import make_recipe
from modeling_deepseek_moe.finetune.train import one_run as train

DiskUsage = collections.namedtuple("DiskUsage", "total used free")


def spoil(monkeypatch, step, where):
    """Let the loss, or only a gradient, be no number in a step."""
    real = train.FineTuner.compute_loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = real(self, model, inputs, *args, **kwargs)
        if self.state.global_step + 1 != step or not model.training:
            return loss
        if where == "loss":
            return loss * float("nan")
        loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    monkeypatch.setattr(train.FineTuner, "compute_loss", compute_loss)


@pytest.mark.parametrize("where, named", [("loss", "the loss became nan"), ("gradient", "the norm of the gradients")])
@pytest.mark.parametrize("clip", [1.0, 0.0], ids=["clipped", "not clipped"])
def test_a_number_that_is_none_stops_the_run_before_it_spoils_anything(go, tmp_path, monkeypatch, where, named, clip):
    spoil(monkeypatch, 4, where)
    with pytest.raises(UserError) as caught:
        go(**{"training.max_grad_norm": clip})
    run = tmp_path / "run"
    message = str(caught.value)
    assert message.startswith(named) and " at step 4; " in message and "\n" not in message
    assert f"the last good checkpoint is {run / 'checkpoint-2'}" in message
    batch = json.loads((run / "bad_batch.json").read_text())
    assert batch["step"] == 4 and len(batch["input_ids"]) == len(batch["texts"]) == 6
    assert all(re.match(r"<s> w\d+ w\d+ ", text) for text in batch["texts"])
    kept = load_file(run / "checkpoint-2" / "adapter_model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in kept.values())
    assert not (run / "summary.json").exists()


@pytest.mark.parametrize("clip", [1.0, 0.0], ids=["clipped", "not clipped"])
def test_the_norm_of_the_gradients_is_computed_once_a_step(go, monkeypatch, clip):
    computed = []
    real = torch.nn.utils.clip_grad._get_total_norm
    monkeypatch.setattr(
        torch.nn.utils.clip_grad, "_get_total_norm", lambda *a, **k: computed.append(None) or real(*a, **k)
    )
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda *_: pytest.fail("once more"))
    go(**{"training.max_grad_norm": clip, "training.max_steps": 3})
    assert len(computed) == 3


def test_a_broken_loss_before_the_first_checkpoint_says_so(go, monkeypatch):
    spoil(monkeypatch, 1, "loss")
    with pytest.raises(UserError, match="at step 1; .*no checkpoint was written yet"):
        go()


def test_too_little_room_is_said_before_the_first_step(go, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(1, 1, 200_000))
    monkeypatch.setattr(train, "eval_loss_before", lambda *a, **k: pytest.fail("the run began"))
    with pytest.raises(RecipeError, match=r"has room for 0.00 GB, and this run writes .* \(3 checkpoints"):
        go()
    assert not (tmp_path / "run").exists()


def test_what_a_run_needs_is_what_it_writes(go, tmp_path, monkeypatch):
    sizes = []
    real = train.checkpoint_bytes
    monkeypatch.setattr(train, "checkpoint_bytes", lambda trainer: sizes.append(real(trainer)) or sizes[0])
    go()
    files = [path for path in (tmp_path / "run" / "checkpoint-6").iterdir() if path.suffix in (".safetensors", ".pt")]
    # Names, shapes and the state of the random generators are written with the numbers.
    assert sizes[0] == pytest.approx(sum(path.stat().st_size for path in files), rel=0.25)


def fail_in_save(patch, error, free):
    """Let what writes the second checkpoint fail, when a disk has so many bytes left."""
    real = train.FineTuner._save
    patch.setattr(train, "check_room", lambda *a: None)

    def save(self, *args, **kwargs):
        if self.state.global_step == 4:
            patch.setattr(shutil, "disk_usage", lambda path: DiskUsage(1, 1, free))
            raise error
        real(self, *args, **kwargs)

    patch.setattr(train.FineTuner, "_save", save)


@pytest.mark.parametrize(
    "error, free",
    [(OSError(errno.ENOSPC, "No space left on device"), 10**12), (RuntimeError("file write failed"), 100)],
    ids=["with its number", "without"],
)
def test_a_disk_that_fills_up_is_named_and_the_run_goes_on_later(tmp_path, base, monkeypatch, error, free):
    recipe = make_recipe(tiny_values(tmp_path, base))
    with monkeypatch.context() as patch:
        fail_in_save(patch, error, free)
        message = r"the disk of .* is full .* free about .*checkpoint-2 is saved; the same command goes on"
        with pytest.raises(UserError, match=message) as caught:
            train.run(recipe)
    assert "\n" not in str(caught.value)
    assert train.run(recipe)["resumed_from"] == "checkpoint-2"


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), PermissionError(errno.EACCES, "Permission denied")],
    ids=["memory of the device", "no right to write"],
)
def test_what_else_fails_in_a_save_keeps_its_type_though_the_disk_is_almost_full(go, monkeypatch, error):
    fail_in_save(monkeypatch, error, free=100)
    with pytest.raises(type(error)) as caught:
        go()
    assert caught.value is error


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("shapes do not match")],
    ids=["memory of the device", "shapes"],
)
def test_an_error_of_a_step_is_not_taken_for_a_full_disk(go, monkeypatch, error):
    def fails(self, *args, **kwargs):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(1, 1, 100))
        raise error

    monkeypatch.setattr(train.FineTuner, "compute_loss", fails)
    monkeypatch.setattr(train, "eval_loss_before", lambda *a, **k: None)
    monkeypatch.setattr(train, "check_room", lambda *a: None)
    with pytest.raises(type(error)) as caught:
        go()
    assert caught.value is error


@pytest.mark.parametrize("where", ["watch_experts", "Collator", "check_room"])
def test_a_value_error_of_our_own_code_is_not_taken_for_settings(go, monkeypatch, where):
    def fails(*args, **kwargs):
        raise ValueError("a bug")

    monkeypatch.setattr(train, where, fails)
    with pytest.raises(ValueError, match="a bug") as caught:
        go()
    assert type(caught.value) is ValueError


def test_a_folder_that_cannot_be_written_is_named_before_anything_is_loaded(tmp_path, base, monkeypatch):
    monkeypatch.setattr(train, "load", lambda recipe: pytest.fail("the model was loaded"))
    (tmp_path / "file").write_text("")
    values = tiny_values(tmp_path, base, output_dir=str(tmp_path / "file" / "run"))
    with pytest.raises(RecipeError, match=r"cannot write in `output_dir` .*: Not a directory"):
        train.run(make_recipe(values))
