"""Runs of recipes in one or several processes (gloo), and what they came to.

    python tests/support/rank_runs.py FOLDER

does what `run_jobs` wrote into FOLDER. Each job has processes of its own, forked from one that has imported everything
and computed nothing.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from fsdp_on_cpu import take_fsdp_on_cpu, take_tp_on_cpu
from places import SUPPORT
from tiny_run import stopped_at

from modeling_deepseek_moe.finetune.errors import UserError
from modeling_deepseek_moe.finetune.files import remove
from modeling_deepseek_moe.finetune.recipe.load import load_recipe, make_recipe
from modeling_deepseek_moe.finetune.train import one_run as train

NUMBERS = ("eval_loss_before", "eval_loss_after", "train_loss", "steps", "resumed_from", "trainable_parameters")


def run_jobs(folder: Path, jobs: dict[str, dict[str, Any]], timeout: float = 600) -> dict[str, list[dict[str, Any]]]:
    """What each rank of each job found: the numbers of its summary, or the line of its error.

    Args:
        folder: empty; gets `NAME.RANK.json`.
        jobs: by name. `ranks`: how many processes; `values`: of the recipe, `recipe`: a shipped one instead, of which
            `values` are overrides; `stop`: after so many steps it is stopped as by Ctrl-C; `lost`: files and folders
            of the run that are gone before; `is_left_to_accelerate`: FSDP is not put through on CPUs; `spoilt`: in the
            second step the loss of this rank is no number, or with "gradient" a gradient of all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, __file__, str(folder)]
    done = subprocess.run(command, timeout=timeout, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    found = {}
    for name, job in jobs.items():
        files = [folder / f"{name}.{rank}.json" for rank in range(job["ranks"])]
        found[name] = [json.loads(file.read_text("utf-8")) for file in files]
    return found


def one_of(rank: int, name: str, job: dict[str, Any], folder: Path) -> None:
    torch.set_num_threads(1)
    ranks = job["ranks"]
    if ranks > 1:
        os.environ |= {key: str(rank) for key in ("RANK", "LOCAL_RANK")}
        os.environ |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        store = f"file://{folder}/store-{name}"
        torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    result = result_of(job)
    (folder / f"{name}.{rank}.json").write_text(json.dumps(result), encoding="utf-8")
    if ranks > 1 and "error" not in result:  # a process with an error ends, whatever the others wait for
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def result_of(job: dict[str, Any]) -> dict[str, Any]:
    values = {"training.use_cpu": True, **job["values"]}
    with pytest.MonkeyPatch.context() as patch:
        if values.get("training.fsdp") and not job.get("is_left_to_accelerate"):
            take_fsdp_on_cpu(patch)
        if values.get("parallel.tp", 1) > 1 and not job.get("is_left_to_accelerate"):
            take_tp_on_cpu(patch)
        if "spoilt" in job:
            spoil(patch, job["spoilt"])
        try:
            if "recipe" in job:
                recipe = load_recipe(job["recipe"], [f"{key}={json.dumps(value)}" for key, value in values.items()])
            else:
                recipe = make_recipe(values)
            if "stop" in job:
                with stopped_at(job["stop"]):
                    train.run(recipe)
                return {}
            summary = train.run(recipe)
        except UserError as error:
            return {"error": str(error)}
    return {key: summary[key] for key in NUMBERS}


def spoil(patch: pytest.MonkeyPatch, where: int | str) -> None:
    real = train.FineTuner.compute_loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = real(self, model, inputs, *args, **kwargs)
        if self.state.global_step == 1 and model.training:
            if where == "gradient":
                loss.register_hook(lambda gradient: gradient * float("inf"))
            elif where == self.args.process_index:
                loss = loss * float("nan")
        return loss

    patch.setattr(train.FineTuner, "compute_loss", compute_loss)


def main(folder: Path) -> None:
    method = "fork" if sys.platform == "linux" else "spawn"
    for name, job in json.loads((folder / "jobs.json").read_text("utf-8")).items():
        remove(Path(job["values"]["output_dir"]) / lost for lost in job.get("lost", []))
        arguments = (name, job, folder)
        torch.multiprocessing.start_processes(one_of, args=arguments, nprocs=job["ranks"], start_method=method)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
