"""SIGTERM ends a run as Ctrl-C does, with a checkpoint of the step it came in, in one process or in several."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from places import SUPPORT
from safetensors.torch import load_file
from tiny_run import tiny_base, tiny_values
from transformers import TrainerCallback

from modeling_deepseek_moe.finetune.recipe.load import make_recipe
from modeling_deepseek_moe.finetune.train import one_run as train
from modeling_deepseek_moe.finetune.train.stop import stopped_by_sigterm
from modeling_deepseek_moe.finetune.train.trainer import RunTrainerMixin

DROPOUT = {"lora.targets": ["attention"], "lora.lora_dropout": 0.2}


class SendAt(TrainerCallback):
    """SIGTERM to this process in the middle of a step, twice; or in the middle of an evaluation."""

    def __init__(self, step, event="on_step_begin"):
        self.step = step
        setattr(self, event, self.send)

    def send(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)


def sending(patch, callback):
    real = RunTrainerMixin.__init__

    def patched(self, *args, callbacks, **kwargs):
        real(self, *args, callbacks=[callback, *callbacks], **kwargs)

    patch.setattr(RunTrainerMixin, "__init__", patched)


def log_of(run):
    """The log without times, and without the last row, which is of one call."""
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    timed = ("runtime", "per_second", "preparation_time")
    rows = [{name: value for name, value in row.items() if not name.endswith(timed)} for row in history]
    return [row for row in rows if "train_loss" not in row]


def weights(run):
    return load_file(run / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "send, saved",
    [(SendAt(2), 3), (SendAt(3), 4), (SendAt(4, "on_prediction_step"), 4), (SendAt(10, "on_train_end"), 10)],
    ids=["between two checkpoints", "where one is due", "in an evaluation", "at the end of training"],
)
def test_a_checkpoint_of_the_step_is_saved_and_the_run_goes_on_with_the_same_bits(tmp_path, base, send, saved):
    # What no log has said yet is in the next one, of experts and losses too.
    options = {**DROPOUT, "training.eval_strategy": "steps", "training.eval_steps": 2, "training.logging_steps": 5}
    options |= {"losses.aux_loss_alpha": 0.1, "training.max_steps": 10}
    values = tiny_values(tmp_path, base, **options)
    at_once = train.run(make_recipe({**values, "output_dir": str(tmp_path / "at_once")}))
    before = signal.getsignal(signal.SIGTERM)
    stopped = rf"^stopped: .*checkpoint-{saved} is saved; the same command goes on from there$"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt, match=stopped):
        sending(patch, send)
        train.run(make_recipe(values))
    assert signal.getsignal(signal.SIGTERM) is before
    again = train.run(make_recipe(values))
    assert again["resumed_from"] == f"checkpoint-{saved}"
    same = ("steps", "train_loss", "eval_loss_before", "eval_loss_after")
    assert [again[key] for key in same] == [at_once[key] for key in same]
    one, other = weights(tmp_path / "at_once"), weights(tmp_path / "run")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    logs = [log_of(tmp_path / name) for name in ("at_once", "run")]
    assert logs[0] == logs[1] and [row["step"] for row in logs[0] if "loss" in row] == [5, 10]
    assert all({"max_violation", "aux_loss"} <= row.keys() for row in logs[0] if "loss" in row)
    experts = [json.loads((tmp_path / name / "experts.json").read_text()) for name in ("at_once", "run")]
    assert experts[0] == experts[1]


def test_before_the_first_step_there_is_nothing_to_save(tmp_path, base, monkeypatch):
    monkeypatch.setattr(train, "eval_loss_before", lambda *a, **k: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt, match="^stopped: no checkpoint was written yet; the same command begins"):
        train.run(make_recipe(tiny_values(tmp_path, base)))
    monkeypatch.undo()
    assert train.run(make_recipe(tiny_values(tmp_path, base)))["resumed_from"] is None


def test_the_command_says_what_is_saved_and_ends_with_130(tmp_path, base):
    values = tiny_values(tmp_path, base, **{"training.max_steps": 100_000, "training.save_steps": 50_000})
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))
    command = [sys.executable, "-u", "-m", "modeling_deepseek_moe.cli.main", "finetune", str(tmp_path / "recipe.yaml")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert next(line for line in child.stdout if "  loss " in line)
        child.terminate()
        _, errors = child.communicate(timeout=240)
    assert child.returncode == 130
    saved = [path.name for path in (tmp_path / "run").glob("checkpoint-*")]
    assert len(saved) == 1 and errors.strip().endswith(f"{saved[0]} is saved; the same command goes on from there")
    assert "Traceback" not in errors


def ready_and_waiting(ready):
    ready.send(True)
    threading.Event().wait()


def test_a_worker_that_inherits_the_handler_ends_all_the_same():
    context = torch.multiprocessing.get_context("fork")
    told, ready = context.Pipe(duplex=False)
    with stopped_by_sigterm() as stop:
        stop.on_train_begin()
        worker = context.Process(target=ready_and_waiting, args=(ready,), daemon=True)
        worker.start()
        try:
            assert told.poll(60)  # Python forgets a signal that comes while a fork is being set up
            ends = time.monotonic() + 60
            while worker.is_alive() and time.monotonic() < ends:
                worker.terminate()  # again: one that comes just before the lock is waited for is heeded after the wait
                worker.join(1)
            assert worker.exitcode == -signal.SIGTERM
        finally:
            worker.kill()


def test_a_process_that_does_not_heed_the_signal_goes_on_without(monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *a: pytest.fail("a handler was set"))
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN)
    with stopped_by_sigterm():
        pass
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_DFL)
    entered = []
    thread = threading.Thread(target=lambda: entered.append(stopped_by_sigterm().__enter__()))
    thread.start()
    thread.join()
    assert entered


def one_of_two(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {name: str(rank) for name in ("RANK", "LOCAL_RANK")} | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    values = json.loads((folder / "values.json").read_text())
    found = {"at_once": train.run(make_recipe({**values, "output_dir": str(folder / "at_once")}))["train_loss"]}
    torch.distributed.barrier()
    try:
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                sending(patch, SendAt(2))
            train.run(make_recipe(values))
    except KeyboardInterrupt as stop:
        found["stopped"] = str(stop)
    torch.distributed.barrier()
    again = train.run(make_recipe(values))
    found |= {"resumed_from": again["resumed_from"], "in_two": again["train_loss"]}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_stop_after_the_same_step_when_one_gets_the_signal(tmp_path):
    options = {**DROPOUT, "training.use_cpu": True, "training.per_device_train_batch_size": 3}
    values = tiny_values(tmp_path, tiny_base(tmp_path / "base"), **options)
    (tmp_path / "values.json").write_text(json.dumps(values))
    environment = {**os.environ, "PYTHONPATH": str(SUPPORT)}
    subprocess.run([sys.executable, __file__, str(tmp_path)], check=True, timeout=600, env=environment)
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert "checkpoint-3 is saved" in found["stopped"]
        assert found["resumed_from"] == "checkpoint-3" and found["in_two"] == found["at_once"]
    one, other = weights(tmp_path / "at_once"), weights(tmp_path / "run")
    assert all(torch.equal(one[name], other[name]) for name in one)


if __name__ == "__main__":
    method = "fork" if sys.platform == "linux" else "spawn"
    torch.multiprocessing.start_processes(one_of_two, args=(Path(sys.argv[1]),), nprocs=2, start_method=method)
