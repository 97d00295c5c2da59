"""Adapters on models that transformers' `DistributedConfig` spreads over processes (gloo, float32), beside one's.

    python tests/support/spread_ranks.py FOLDER RANKS

does the jobs that `run_jobs` wrote into FOLDER, one after the other in one set of processes, forked from one that has
imported everything and computed nothing. What a job compares, each process computes alone too.
"""

import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from peft import LoraConfig, PeftModel, get_peft_model
from places import SUPPORT
from safetensors.torch import save_file
from torch import distributed
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, DistributedConfig, Trainer, TrainingArguments
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from modeling_deepseek_moe.expert_lora import load_adapter, register_expert_lora
from modeling_deepseek_moe.finetune.model.lora import lora_config
from modeling_deepseek_moe.finetune.model.resume import SaveSharded
from modeling_deepseek_moe.finetune.model.shards import save_in_shards
from modeling_deepseek_moe.kernels.sorted import rows as rows_of_experts
from modeling_deepseek_moe.parallel_adapters import average_copies, save_adapter

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
STEPS, MICRO_BATCHES, ROWS, LENGTH = 5, 2, 2, 12
Job = dict[str, Any]


def run_jobs(folder: Path, ranks: int, jobs: dict[str, Job]) -> dict[str, Any]:
    """What the first rank found in each job, by its name.

    Args:
        folder: gets what the jobs write.
        ranks: how many processes.
        jobs: by name. `do`: a function below; `layout`: fields of `DistributedConfig`; what else the function reads.
    """
    (folder / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, __file__, str(folder), str(ranks)]
    done = subprocess.run(command, timeout=400, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return torch.load(folder / "found.pt")


def rows(count: int) -> list[dict[str, list[int]]]:
    """As long as each other, of the ids of every tiny model."""
    ids = torch.randint(5, 90, (count, LENGTH), generator=torch.Generator().manual_seed(7)).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


def train_plainly(model, folder: Path, ranks: int, **options: Any) -> Trainer:
    """A Trainer that takes as many rows a step with any number of processes."""
    arguments = {"per_device_train_batch_size": 4 // ranks, "gradient_accumulation_steps": 2, "max_steps": 4}
    arguments |= {"learning_rate": 1e-3, "max_grad_norm": 0.1, "logging_steps": 1, "save_steps": 2}
    arguments |= {"save_strategy": "steps", "save_only_model": True, "use_cpu": True, "report_to": "none"}
    callbacks = [SaveSharded()] if ranks > 1 else []
    args = TrainingArguments(str(folder), **arguments)
    trainer = Trainer(model, args, train_dataset=rows(64), callbacks=callbacks)
    trainer.train(**options)
    return trainer


def log_of(trainer: Trainer) -> list[tuple[float, float]]:
    """Loss and gradient norm of every step."""
    return [(row["loss"], row["grad_norm"]) for row in trainer.state.log_history if "loss" in row]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def spread(job: Job):
    model = AutoModelForCausalLM.from_pretrained(job["base"], distributed_config=DistributedConfig(**job["layout"]))
    model.set_experts_implementation(job.get("experts", "sorted_mm"))
    return model


def trained_alone(job: Job):
    return load_adapter(AutoModelForCausalLM.from_pretrained(job["base"]), job["adapter"], is_trainable=True)


def steps(job: Job, folder: Path) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        if job.get("body") == "at once":
            patch.setattr(rows_of_experts, "grouped", lambda device: True)
        elif job.get("body") == "triton":
            from plain_launchers import LAUNCHERS, reference

            for module, names in LAUNCHERS.items():
                for name in names:
                    patch.setattr(module, name, getattr(reference, name))
        return take_steps(job, folder)


def take_steps(job: Job, folder: Path) -> dict[str, Any]:
    """Some steps of AdamW in a loop of one's own, with gradients of several micro-batches and clipping."""
    batches = job["layout"].get("dp_replicate_size", 1) * job["layout"].get("fsdp_size", 1)
    alone, model = trained_alone(job), load_adapter(spread(job), job["adapter"], is_trainable=True)
    if job.get("second_rank_serves") == "nobody":
        for name, bias in (*alone.named_buffers(), *model.named_buffers()):
            if name.endswith("e_score_correction_bias"):
                bias[len(bias) // 2 :] = -100
    save_adapter(model, folder / "untrained")
    model.save_pretrained(folder / "untrained_by_peft", is_main_process=distributed.get_rank() == 0)
    average_copies(model)
    parts = [p.to_local() for p in model.parameters() if p.requires_grad and isinstance(p, DTensor)]
    local = sum(part.untyped_storage().nbytes() // part.itemsize for part in parts)  # a view would keep the whole
    found = {"loss": [], "norm": [], "local": local, "gradients": None}
    ids = torch.tensor([row["input_ids"] for row in rows(STEPS * MICRO_BATCHES * batches * ROWS)])
    ids = ids.view(STEPS, MICRO_BATCHES, batches, ROWS, LENGTH)
    trained = [[p for p in each.parameters() if p.requires_grad] for each in (alone, model)]
    for each in (alone, model):
        each.train()
        if job.get("checkpointing"):
            each.enable_input_require_grads()
            each.get_base_model().gradient_checkpointing_enable()
    optimizers = [torch.optim.AdamW(parameters, lr=1e-3, foreach=False) for parameters in trained]
    for step in range(STEPS):
        losses = [torch.zeros(()), torch.zeros(())]
        for micro_batch in ids[step]:
            for batch in micro_batch:
                loss = alone(batch, labels=batch).loss / (batches * MICRO_BATCHES)
                loss.backward()
                losses[0] += loss.detach()
            batch = micro_batch[distributed.get_rank() * batches // distributed.get_world_size()]
            loss = model(batch, labels=batch).loss / MICRO_BATCHES
            loss.backward()
            losses[1] += loss.detach()
        distributed.all_reduce(losses[1], op=distributed.ReduceOp.AVG)
        if step == 0:
            found["gradients"] = gradients_apart(model, alone)
        found["loss"].append([loss.item() for loss in losses])
        found["norm"].append([clip(parameters) for parameters in trained])
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    save_adapter(model, folder / "trained")
    if distributed.get_rank() == 0:
        alone.save_pretrained(folder / "trained_alone")
    return found


def gradients_apart(model, alone) -> dict[str, float]:
    """The largest difference of each gradient, in parts of its largest entry."""
    expected = {name: p.grad for name, p in alone.named_parameters() if p.requires_grad}
    found = {name: whole(p.grad) for name, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys()
    return {name: ((found[name] - e).abs().max() / e.abs().max()).item() for name, e in expected.items()}


@torch.no_grad()
def clip(parameters: list[torch.nn.Parameter]) -> float:
    norm = torch.stack([whole(p.grad).norm() for p in parameters]).norm()
    for p in parameters:
        p.grad.mul_((0.1 / norm).clamp(max=1))
    return norm.item()


def trainer(job: Job, folder: Path) -> dict[str, Any]:
    """The Trainer as it is, then again from its first checkpoint in a model of its own."""
    first = train_plainly(load_adapter(spread(job), job["adapter"], is_trainable=True), folder / "run", job["ranks"])
    first.save_model(str(folder / "saved"))
    again = load_adapter(spread(job), job["adapter"], is_trainable=True)
    checkpoint = str(folder / "run" / "checkpoint-2")
    second = train_plainly(again, folder / "run", job["ranks"], resume_from_checkpoint=checkpoint)
    is_equal = [
        torch.equal(whole(a), whole(b))
        for (name, a), b in zip(first.model.named_parameters(), second.model.parameters(), strict=True)
        if ".lora_" in name
    ]
    return {"log": log_of(first), "is_equal": is_equal, "log_again": log_of(second)}


@torch.no_grad()
def several(job: Job, folder: Path) -> dict[str, float]:
    """How far logits are from those of one process with two adapters, with one and with none."""
    ids = torch.tensor([row["input_ids"] for row in rows(2)])
    found = []
    for model in (trained_alone(job), load_adapter(spread(job), job["adapter"])):
        load_adapter(model.eval(), job["adapter"], "second")
        logits = {}
        for names in (["default", "second"], ["second"]):
            model.base_model.set_adapter(names)
            logits[f"{len(names)}"] = model(ids).logits
        with model.disable_adapter():
            logits["0"] = model(ids).logits
        found.append(logits)
    alone, model = found
    assert not any(torch.allclose(alone[a], alone[b], rtol=0.01) for a, b in ("01", "02", "12"))
    return {name: ((model[name] - alone[name]).abs().max() / alone[name].abs().max()).item() for name in alone}


def start(job: Job, folder: Path) -> dict[str, bool]:
    """Whether a new adapter starts as in one process with the same seed."""
    models = []
    for model in (AutoModelForCausalLM.from_pretrained(job["base"], dtype=torch.bfloat16), spread(job).bfloat16()):
        torch.manual_seed(3)
        config = lora_config(model, ["routed_experts"], r=4, init_lora_weights=job["how"])
        models.append(get_peft_model(model, config))
    alone, model = models
    return {
        name: torch.equal(whole(p), alone.get_parameter(name)) and p.dtype == torch.float32
        for name, p in model.named_parameters()
        if ".lora_" in name
    }


def refused(job: Job, folder: Path) -> str:
    """What one line of Python is told on a model that is spread so."""
    try:
        LINES[job["line"]](spread(job))
    except ValueError as error:
        return str(error)
    return "nothing"


def run_otherwise(model) -> None:
    adapted = get_peft_model(model, lora_config(model, ["routed_experts"]))
    ALL_EXPERTS_FUNCTIONS.register("other", ALL_EXPERTS_FUNCTIONS["grouped_mm"])
    model.set_experts_implementation("other")
    adapted(torch.zeros(1, 4, dtype=torch.long))


LINES = {
    "attention": lambda model: lora_config(model, ["attention"]),
    "experts of any class": lambda model: register_expert_lora(LoraConfig(target_parameters=EXPERTS), model),
    "merge": lambda model: get_peft_model(model, lora_config(model, ["routed_experts"])).merge_and_unload(),
    "pissa": lambda model: get_peft_model(model, lora_config(model, ["routed_experts"], init_lora_weights="pissa")),
    "another product": run_otherwise,
}


def stock(job: Job, folder: Path) -> dict[str, float] | str:
    """PEFT's own layer on the same experts: how far its gradients are, or how it fails."""
    alone = trained_alone(job)
    ids = torch.tensor([row["input_ids"] for row in rows(4)]).view(2, 2, LENGTH)
    for batch in ids:
        (alone(batch, labels=batch).loss / 2).backward()
    batch = ids[distributed.get_rank()]
    try:
        model = PeftModel.from_pretrained(spread(job), job["adapter"], is_trainable=True)
        model(batch, labels=batch).loss.backward()
        return gradients_apart(average_gradients(model), alone)
    except (RuntimeError, ValueError, AttributeError, TypeError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"


def average_gradients(model):
    for p in model.parameters():
        if p.requires_grad:
            distributed.all_reduce(p.grad, op=distributed.ReduceOp.AVG)
    return model


def shards(job: Job, folder: Path) -> list[tuple[int, int]]:
    """Saves the model in files of `largest` bytes; the process and the bytes of each."""
    written = []

    def noted(tensors: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> None:
        written.append((distributed.get_rank(), sum(tensor.nbytes for tensor in tensors.values())))
        save_file(tensors, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("modeling_deepseek_moe.finetune.model.shards.save_file", noted)
        save_in_shards(spread(job), folder / "model", job["largest"])
    found: list[Any] = [None] * job["ranks"]
    distributed.all_gather_object(found, written)
    return sum(found, [])


def loading(job: Job, folder: Path) -> list[int]:
    """The most memory of its own, in bytes, that each process had more while it loaded the model."""
    before = own_memory()
    peak, is_over = [0], threading.Event()

    def watch() -> None:
        while not is_over.wait(0.001):
            peak[0] = max(peak[0], own_memory() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    model = spread(job)
    is_over.set()
    thread.join()
    assert model.is_distributed_loading_by_transformers
    found: list[Any] = [None] * job["ranks"]
    distributed.all_gather_object(found, peak[0])
    return found


def own_memory() -> int:
    """Bytes of this process that are no file's."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"RssAnon:\s+(\d+) kB", status)[1])


def one_of(rank: int, folder: Path, ranks: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {key: str(rank) for key in ("RANK", "LOCAL_RANK")}
    os.environ |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    found = {}
    for name, job in json.loads((folder / "jobs.json").read_text("utf-8")).items():
        (folder / name).mkdir(exist_ok=True)
        found[name] = globals()[job["do"]]({**job, "ranks": ranks}, folder / name)
        distributed.barrier()
    if rank == 0:
        torch.save(found, folder / "found.pt")
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    method = "fork" if sys.platform == "linux" else "spawn"
    arguments = (Path(sys.argv[1]), int(sys.argv[2]))
    torch.multiprocessing.start_processes(one_of, args=arguments, nprocs=arguments[1], start_method=method)
