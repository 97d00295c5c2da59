"""Four-bit base weights under LoRA against the weights as they are: how training goes, and what it takes in memory.

    OMP_WAIT_POLICY=PASSIVE python tests/benchmarks/quantized.py --threads 1

Loss: the demo's base, task and recipe, the same rows in the same order. Memory: one layer of DeepSeek-V2-Lite's size
(64 experts) with LoRA on its routed experts, bfloat16, each side in a process of its own: what loading the checkpoint
takes at most, what the base weights hold then, and what a training step takes at most. Only memory of the process
itself is counted (`RssAnon`), read every two milliseconds; pages of the mapped file can be dropped at any time.

Writes quantized.json and quantized.png.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import multiprocessing
import os
import platform
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from environment import commit, processor
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from modeling_deepseek_moe import DeepseekMoeConfig, DeepseekMoeForCausalLM
from modeling_deepseek_moe.checkpoint_layout import expected_tensors
from modeling_deepseek_moe.finetune.demo import one_demo as demo
from modeling_deepseek_moe.finetune.demo import task as demo_task
from modeling_deepseek_moe.finetune.model.lora import lora_config
from modeling_deepseek_moe.finetune.recipe.load import load_recipe
from modeling_deepseek_moe.finetune.train import one_run as train
from modeling_deepseek_moe.presets import released_json
from modeling_deepseek_moe.quantized.loading import NF4Config
from modeling_deepseek_moe.quantized.weights import NF4Weight

HERE = Path(__file__).parent
SIDES = {"float32": {"dtype": "float32"}, "nf4": {"dtype": "float32", "quantization": "nf4"}}
TOKENS = 512


def main(
    steps: Annotated[int, typer.Option(min=1, help="Of each training run.")] = 100,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    output: Annotated[Path, typer.Option(help="Without suffix.")] = HERE / "results" / "quantized",
) -> None:
    """Measure, print, write."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as scratch:
        memory = memory_of_both(Path(scratch), threads)
        loss = {name: train_side(Path(scratch) / name, values, steps) for name, values in SIDES.items()}
    where = {"commit": commit(), "device": processor(), "threads": threads, "python": platform.python_version()}
    where |= {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")}
    results = {"environment": where, "steps": steps, "tokens": TOKENS, "loss": loss, "memory": memory}
    output.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    draw(loss, output.with_suffix(".png"))
    show(results)


def train_side(folder: Path, values: dict[str, str], steps: int) -> dict[str, Any]:
    """Loss every ten steps and on held-out rows, of a run of the demo's recipe."""
    folder.mkdir()
    rows = folder / "rows.jsonl"
    recipe = Path(demo.__file__).parents[1] / "recipes" / "demo.yaml"
    # What `steps` batches of 32 take after the held-out share.
    items = demo_task.split_items(-(-steps * 32 * 100 // 98)).train
    rows.write_text("".join(json.dumps(demo_task.training_row(item)) + "\n" for item in items), encoding="utf-8")
    values = {"model": demo.base_folder(), "data": rows, "output_dir": folder / "run", "merge": "false", **values}
    values |= {"training.max_steps": steps, "training.disable_tqdm": "true"}
    summary = train.run(load_recipe(recipe, [f"{key}={value}" for key, value in values.items()]))
    history = json.loads((folder / "run" / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    held_out = [(row["step"], row["eval_loss"]) for row in history if "eval_loss" in row]
    return {
        "training": [(row["step"], row["loss"]) for row in history if "loss" in row],
        "held out": [(0, summary["eval_loss_before"]), *dict(held_out).items()],
    }


def memory_of_both(scratch: Path, threads: int) -> dict[str, dict[str, int]]:
    """Bytes by side and by what they are of."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        for name, layer in (("warm-up", {"n_routed_experts": 8, "moe_intermediate_size": 64}), ("layer", {})):
            pool.submit(write_layer, scratch / name, layer).result()
        sides = {"bfloat16": None, "nf4": NF4Config()}
        return {name: pool.submit(memory_of, scratch, side, threads).result() for name, side in sides.items()}


def write_layer(folder: Path, changes: dict[str, int]) -> None:
    """A random checkpoint of one layer with experts, of DeepSeek-V2-Lite's widths."""
    fields = released_json("deepseek-v2-lite") | {"num_hidden_layers": 1, "first_k_dense_replace": 0}
    config = DeepseekMoeConfig.from_dict(fields | {"vocab_size": 1024, "dtype": "bfloat16"} | changes)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.ones(shape, dtype=dtype)
        if "norm" in name
        else torch.empty(shape, dtype=dtype).normal_(0, 0.02, generator=generator)
        for name, (shape, dtype) in expected_tensors(config).items()
    }
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)


def memory_of(scratch: Path, quantization: NF4Config | None, threads: int) -> dict[str, int]:
    """Of one side. A small model goes first, so that the code that a first step loads is not counted."""
    torch.set_num_threads(threads)
    load_and_step(scratch / "warm-up", quantization)
    return load_and_step(scratch / "layer", quantization)


def load_and_step(folder: Path, quantization: NF4Config | None) -> dict[str, int]:
    """Loads the model, adapts its routed experts and takes two training steps."""
    found, before = {}, anonymous_bytes()

    def load() -> DeepseekMoeForCausalLM:
        options = {"quantization_config": quantization} if quantization else {"experts_implementation": "sorted_mm"}
        return DeepseekMoeForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)

    model, found["loading, at most"] = peak_of(load, before)
    found["base weights"] = sum(
        weight.held_bytes if isinstance(weight, NF4Weight) else weight.nbytes for weight in model.parameters()
    )
    model.requires_grad_(False)
    adapted = get_peft_model(model, lora_config(model, ["routed_experts"], r=16)).train()
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    found["adapters and their gradients"] = 2 * sum(parameter.nbytes for parameter in trained)
    ctypes.CDLL(None).malloc_trim(0)  # what loading has freed, and the allocator kept
    ids = torch.randint(1024, (1, TOKENS), generator=torch.Generator().manual_seed(1))

    def step() -> None:
        for _ in range(2):
            adapted.zero_grad()
            adapted(ids, labels=ids, use_cache=False).loss.backward()

    found["training step, at most"] = peak_of(step, before)[1]
    return found


def peak_of(work: Callable[[], Any], before: int) -> tuple[Any, int]:
    """What `work` returns, and the most memory meanwhile, above `before`."""
    done, peak = threading.Event(), 0

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous_bytes())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = work()
    finally:
        done.set()
        watcher.join()
    return result, peak - before


def anonymous_bytes() -> int:
    """Memory of this process that is not a mapped file."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon")


def draw(loss: dict[str, dict[str, Any]], path: Path) -> None:
    """The loss curves of both sides."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for colour, (name, found) in zip(("tab:blue", "tab:red"), loss.items(), strict=True):
        axes.plot(*zip(*found["training"], strict=True), color=colour, label=f"{name}, training")
        axes.plot(*zip(*found["held out"], strict=True), "o--", color=colour, label=f"{name}, held out")
    axes.set(xlabel="optimizer step", ylabel="loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def show(results: dict[str, Any]) -> None:
    """Two tables on the screen."""
    console = Console()
    table = Table("step", *results["loss"], title="Training loss")
    for points in zip(*(found["training"] for found in results["loss"].values()), strict=True):
        table.add_row(str(points[0][0]), *(f"{value:.4f}" for _, value in points))
    console.print(table)
    table = Table("MB", *results["memory"], title=f"One layer of V2-Lite, {results['tokens']} tokens")
    for key in next(iter(results["memory"].values())):
        table.add_row(key, *(f"{found[key] / 1e6:,.0f}" for found in results["memory"].values()))
    console.print(table)


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    typer.run(main)
