"""The README's lines for two machines and slurm.sh: two groups of processes that meet on two addresses of loopback."""

import contextlib
import json
import os
import random
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT
from tiny_run import tiny_base, tiny_values

from modeling_deepseek_moe.finetune.recipe.load import load_recipe
from modeling_deepseek_moe.finetune.train.one_run import run

README = (ROOT / "finetune" / "README.md").read_text(encoding="utf-8")
MACHINES = ("127.0.0.1", "127.0.0.2")
OPTIONS = {"training.max_steps": 2, "training.use_cpu": True, "dtype": "float32"}
OPTIONS |= {"training.gradient_accumulation_steps": 1, "training.warmup_steps": 0}
LAUNCHERS = {"torchrun": "torch.distributed.run", "accelerate launch": "accelerate.commands.launch"}


def free_port() -> int:
    """One of those that slurm.sh makes of a job's number."""
    for port in random.sample(range(20000, 30000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((MACHINES[0], port))
            return port
    raise OSError("no free port")


def words_of(base: Path, folder: Path, ranks: int) -> list[str]:
    """A recipe's words, whose batch is eight rows on any number of processes."""
    values = {**tiny_values(folder, base), **OPTIONS, "training.per_device_train_batch_size": 8 // ranks}
    return [f"{key}={json.dumps(value) if isinstance(value, list) else value}" for key, value in values.items()]


def readme_line(launcher: str, port: int, words: list[str]) -> list[str]:
    """The README's command for two machines, with two processes on each and our recipe."""
    (line,) = re.findall(rf"^{launcher} .*host1.*$", README, re.MULTILINE)
    options = line.removeprefix(launcher).partition(" finetune ")[0]
    options = options.replace("host1", MACHINES[0]).replace("29500", str(port))
    options = options.replace("--nproc-per-node 8", "--nproc-per-node 2").replace("processes 16", "processes 4")
    return [sys.executable, "-m", LAUNCHERS[launcher], *shlex.split(options), "finetune", "lora_all", *words]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


def finish(folder: Path, commands: list[list[str]], **more: str) -> None:
    """Runs commands side by side, each of which must end well."""
    with contextlib.ExitStack() as stack:
        said = [stack.enter_context((folder / f"said.{i}").open("w+", encoding="utf-8")) for i in range(len(commands))]
        running = [
            subprocess.Popen(command, env=environment(**more), stdout=file, stderr=subprocess.STDOUT)
            for command, file in zip(commands, said, strict=True)
        ]
        try:
            ended = [process.wait(timeout=300) for process in running]
        finally:
            for process in running:
                process.terminate()
        for file in said:
            file.seek(0)
        assert ended == [0] * len(running), "\n".join(file.read()[-3000:] for file in said)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("two_machines") / "base")


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory) -> dict:
    """The summary of the same run in one process."""
    return run(load_recipe("lora_all", words_of(base, tmp_path_factory.mktemp("alone"), 1)))


def check_alike(folder: Path, alone: dict) -> None:
    summary = json.loads((folder / "run" / "summary.json").read_text("utf-8"))
    assert summary["steps"] == alone["steps"] == 2
    for key in ("train_loss", "eval_loss_before", "eval_loss_after"):
        assert summary[key] == pytest.approx(alone[key], rel=1e-5), key
    assert (folder / "run" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_readmes_line_on_two_machines_trains_as_one_process(launcher, base, alone, tmp_path):
    line = readme_line(launcher, free_port(), words_of(base, tmp_path, 4))
    lines = [list(line) for _ in MACHINES]
    for number, (each, address) in enumerate(zip(lines, MACHINES, strict=True)):
        if launcher == "torchrun":
            each[3:3] = ["--local-addr", address]  # of one machine that plays two
        else:
            each[each.index("--machine_rank") + 1] = str(number)
    finish(tmp_path, lines)
    check_alike(tmp_path, alone)


@pytest.mark.slow
def test_the_slurm_script_trains_as_one_process(base, alone, tmp_path):
    """`srun` and `scontrol` are played: the one runs its command once for each machine, the other names them."""
    tools = tmp_path / "tools"
    tools.mkdir()
    launch = f'"{sys.executable}" -m torch.distributed.run --local-addr'
    played = {
        "scontrol": "\n".join(f"echo {address}" for address in MACHINES),
        "srun": f'shift\n{launch} {MACHINES[1]} "$@" &\n{launch} {MACHINES[0]} "$@" || exit\nwait $!',
    }
    for name, text in played.items():
        (tools / name).write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
        (tools / name).chmod(0o755)
    script = ROOT / "finetune" / "slurm.sh"
    assert len(script.read_text(encoding="utf-8").splitlines()) == 10
    slurm = {"SLURM_JOB_NODELIST": "two", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "2"}
    slurm |= {"SLURM_JOB_ID": str(free_port() - 20000), "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    finish(tmp_path, [["bash", str(script), "lora_all", *words_of(base, tmp_path, 4)]], **slurm)
    check_alike(tmp_path, alone)


def test_the_readme_has_the_lines_for_one_machine_and_for_two():
    for launcher in LAUNCHERS:
        assert len(re.findall(rf"^{launcher} ", README, re.MULTILINE)) == 2
        assert readme_line(launcher, 1, ["word=1"])[-1] == "word=1"
