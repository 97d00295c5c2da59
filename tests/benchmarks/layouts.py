"""Every shipped recipe under every layout of two processes (gloo, on CPUs), against one process: a table.

    python tests/benchmarks/layouts.py --scratch DIR [--recipes lora_all full]
        [--layouts "DDP 2" "FSDP2 2" "ZeRO-3 2"]

A cell has the largest relative difference of the losses and gradient norms of six steps and of the held-out losses,
and the largest difference of a saved weight; or the line by which the layout is refused.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

import torch
from compared_runs import weights_of
from rank_runs import run_jobs
from tiny_run import counting_rows, tiny_base, write_jsonl

from modeling_deepseek_moe.finetune.recipe.load import SHIPPED

ZERO = {"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}}
ZERO |= dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto")
LAYOUTS = {
    "one": (1, {}),
    "DDP 2": (2, {}),
    "FSDP2 2": (2, {"training.fsdp": True}),
    "ZeRO-3 2": (2, {"training.deepspeed": ZERO}),
    "EP2 x FSDP2 2": (2, {"parallel.ep": 2}),
}
# 18 rows, of which a global batch has 6: accelerate would fill up a last one, for each process to have a part of it.
# Texts are more, since they are packed.
TINY = {
    "max_length": 32,
    "dtype": "float32",
    "eval_fraction": 0.25,
    "training.max_steps": 6,
    "training.gradient_accumulation_steps": 1,
    "training.warmup_steps": 0,
    "training.logging_steps": 1,
    "training.save_steps": 3,
    "training.bf16": False,
    "training.disable_tqdm": True,
}


def rows_of(folder: Path) -> dict[str, Path]:
    pairs = [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": " w0 w0 w0"}
        for row in counting_rows("prompt")
    ]
    kinds = {"preferences": pairs, "messages": counting_rows("messages"), "text": counting_rows("text", 400)}
    return {kind: write_jsonl(folder / f"{kind}.jsonl", rows) for kind, rows in kinds.items()}


def jobs_of(folder: Path, recipes: list[str], layouts: list[str]) -> dict[str, dict]:
    torch.manual_seed(0)
    base, rows, jobs = tiny_base(folder / "base"), rows_of(folder), {}
    for recipe in recipes:
        kind = {"dpo": "preferences", "continue_pretraining": "text"}.get(recipe, "messages")
        for layout in layouts:
            ranks, options = LAYOUTS[layout]
            name = f"{recipe} {layout}".replace(" ", "-")
            values = {**TINY, "model": str(base), "data": str(rows[kind]), "output_dir": str(folder / name), **options}
            values |= {"training.per_device_train_batch_size": 6 // ranks}
            if recipe.startswith("lora"):  # each process draws its own
                values["lora.lora_dropout"] = 0.0
            values |= {"training.learning_rate": 1e-4 if recipe in ("full", "continue_pretraining") else 1e-3}
            jobs[name] = {"recipe": recipe, "ranks": ranks, "values": values}
    return jobs


def compared(run: Path, one: Path) -> str:
    logs = [json.loads((each / "trainer_state.json").read_text("utf-8"))["log_history"] for each in (run, one)]
    summaries = [json.loads((each / "summary.json").read_text("utf-8")) for each in (run, one)]
    apart = {}
    for key in ("loss", "grad_norm"):
        ours, theirs = ([row[key] for row in log if key in row] for log in logs)
        assert len(ours) == len(theirs)
        apart[key] = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
    keys = ("eval_loss_before", "eval_loss_after")
    held_out = max(abs(summaries[0][key] - summaries[1][key]) / summaries[1][key] for key in keys)
    ours, theirs = weights_of(run), weights_of(one)
    if ours.keys() != theirs.keys():
        return f"saves other tensors: {sorted(ours.keys() ^ theirs.keys())[0]}"
    weights = max(float((ours[name].float() - theirs[name].float()).abs().max()) for name in theirs)
    return f"loss {apart['loss']:.0e}, norm {apart['grad_norm']:.0e}, held out {held_out:.0e}, saved {weights:.0e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="new folder")
    parser.add_argument("--recipes", nargs="*", default=list(SHIPPED))
    parser.add_argument("--layouts", nargs="*", default=["DDP 2", "FSDP2 2"], choices=list(LAYOUTS)[1:])
    options = parser.parse_args()
    layouts = options.layouts
    options.scratch.mkdir(parents=True)
    jobs = jobs_of(options.scratch, options.recipes, ["one", *layouts])
    found = run_jobs(options.scratch / "jobs", jobs, timeout=3600)
    print("| recipe | " + " | ".join(layouts) + " |\n|---|" + "---|" * len(layouts))
    for recipe in options.recipes:
        cells = []
        for layout in layouts:
            name = f"{recipe} {layout}".replace(" ", "-")
            error = found[name][0].get("error")
            one = options.scratch / f"{recipe}-one"
            cells.append(f"refused: {error}" if error else compared(options.scratch / name, one))
        print(f"| `{recipe}` | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
