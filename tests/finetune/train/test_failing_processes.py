"""Runs of which one process fails: all end, say which one it was, and leave what the next call goes on from."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from rank_runs import run_jobs
from safetensors.torch import load_file
from tiny_run import tiny_base, tiny_values

pytestmark = pytest.mark.slow
HALF = {"training.use_cpu": True, "training.per_device_train_batch_size": 3}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"))


def jobs_of(folder: Path, base: Path, jobs: dict[str, dict]) -> dict[str, list[str]]:
    """The error of each rank, by job."""
    values = {}
    for name, job in jobs.items():
        (folder / name).mkdir()
        options = {**HALF, "training.max_steps": 3, "training.save_steps": 1, **job.pop("options", {})}
        values[name] = {"ranks": 2, "values": tiny_values(folder / name, base, **options), **job}
    found = run_jobs(folder / "jobs", values)
    return {name: [rank["error"] for rank in ranks] for name, ranks in found.items()}


def test_numbers_that_are_none_stop_all_processes_in_the_same_step(tmp_path, base):
    fsdp = {"training.fsdp": True}
    errors = jobs_of(
        tmp_path,
        base,
        {
            "loss": {"spoilt": 1},
            "gradient": {"spoilt": "gradient"},
            "sharded loss": {"spoilt": 1, "options": fsdp},
            "sharded gradient": {"spoilt": "gradient", "options": fsdp},
        },
    )
    for name, (first, second) in errors.items():
        run = tmp_path / name / "run"
        assert " at step 2; " in second and f"the last good checkpoint is {run / 'checkpoint-1'}" in second
        assert f"are in {run / 'bad_batch-1.json'};" in second
        assert " at step 2; " in first or first.startswith(
            "process 1 of 2 ended the run: the loss became nan at step 2"
        )
        batch = json.loads((run / "bad_batch-1.json").read_text("utf-8"))
        assert batch["step"] == 2 and len(batch["input_ids"]) == 3
        kept = [*run.glob("checkpoint-1/adapter_model.safetensors")]
        assert all(torch.isfinite(tensor).all() for file in kept for tensor in load_file(file).values())


def test_sharding_that_accelerate_would_leave_out_in_silence_is_refused_and_leaves_nothing(tmp_path, base):
    job = {"is_left_to_accelerate": True, "options": {"training.fsdp": True}}
    first, second = jobs_of(tmp_path, base, {"sharded": job})["sharded"]
    assert first == second and first.startswith("`training.fsdp` is set, but accelerate shards on GPUs alone")
    assert not (tmp_path / "sharded" / "run").exists()


def launch(recipe: Path) -> subprocess.Popen:
    command = ["torch.distributed.run", "--nproc-per-node", "2", "-m", "modeling_deepseek_moe.cli.main", "finetune"]
    environment = {**os.environ, "MASTER_PORT": "0"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, "-u", "-m", *command, str(recipe)], env=environment, **pipes)


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
@pytest.mark.parametrize("layout", [{}, {"parallel.ep": 2}], ids=["copies", "experts apart"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_takes_the_run_down_with_a_line_that_names_it_and_the_run_goes_on(
    tmp_path, base, rank, layout
):
    lora = {"lora.targets": ["attention"], "lora.lora_dropout": 0.2}
    every = 10 if layout else 50
    options = {**HALF, **lora, **layout, "training.max_steps": 6 * every, "training.save_steps": every}
    options |= {"training.save_total_limit": 2}
    values = tiny_values(tmp_path, base, **options)
    recipes = {}
    for name in ("run", "at_once"):
        recipes[name] = tmp_path / f"{name}.yaml"
        recipes[name].write_text(json.dumps({**values, "output_dir": str(tmp_path / name)}), encoding="utf-8")
    output, processes = [], []
    with launch(recipes["run"]) as launcher:
        for line in launcher.stdout:
            output.append(line)
            if not processes and (tmp_path / "run" / f"checkpoint-{every}" / "complete").is_file():
                processes = psutil.Process(launcher.pid).children(recursive=True)
                victim = next(each for each in processes if each.environ().get("RANK") == str(rank))
                victim.send_signal(signal.SIGKILL)
        assert launcher.wait(timeout=60) != 0
    said = f"process {rank} of 2 (number {victim.pid} on "
    assert len([line for line in output if line.startswith(said)]) == 1, "".join(output)
    gone, alive = psutil.wait_procs(processes, timeout=60)
    assert not alive
    for name in recipes:
        with launch(recipes[name]) as launcher:
            told, _ = launcher.communicate(timeout=240)
        assert launcher.returncode == 0, told[-3000:]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["resumed_from"]
    one, other = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in recipes)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
