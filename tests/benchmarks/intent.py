"""ESFT's intent data on a small base: exact match before and after `lora_all` and `esft_token`.

    python tests/benchmarks/intent.py INTENT.jsonl --scratch DIR [--steps 1200]

INTENT.jsonl is `datasets/train/intent.jsonl` of deepseek-ai/ESFT, which is not shipped here. 500 of its rows are held
out. The demo's base never saw Chinese, so it reads the other rows' sentences first, each twice in a row, without its
answer (`continue_pretraining`); that is the base of both recipes. A run that was stopped goes on. Writes intent.json,
intent.md and intent.png to tests/benchmarks/results.
"""

import argparse
import json
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from modeling_deepseek_moe.finetune.demo.one_demo import base_folder

HERE = Path(__file__).parent
RATES = {"continue_pretraining": 2e-3, "lora_all": 6e-3, "esft_token": 4e-3}
SETTINGS = {
    "max_length": 384,
    "dtype": "float32",
    "gradient_checkpointing": False,
    "training.per_device_train_batch_size": 16,
    "training.per_device_eval_batch_size": 50,
    "training.gradient_accumulation_steps": 1,
    "training.lr_scheduler_type": "cosine",
    "training.warmup_steps": 20,
    "training.weight_decay": 0.0,
    "training.logging_steps": 20,
    "training.save_steps": 100,
    "training.bf16": False,
    "training.use_cpu": True,
    "training.disable_tqdm": True,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--reading-steps", type=int, default=1200)
    parser.add_argument("--jobs", type=int, default=2, help="runs beside each other, one thread each")
    parser.add_argument("--recipes", nargs="+", choices=RATES, default=["lora_all", "esft_token"])
    parser.add_argument("--output", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    scratch = arguments.scratch
    files = split(arguments.data, scratch)
    reads = {"packing": False, "eval_data": str(files["held_out_sentences"]), "data": str(files["sentences"])}
    run("continue_pretraining", base_folder(), reads, scratch, arguments.reading_steps)
    base = scratch / f"continue_pretraining-{arguments.reading_steps}" / "model"
    learns = {"metric": str(HERE / "intent_match.py"), "metric_rows": 500}
    learns |= {"data": str(files["train"]), "eval_data": str(files["held_out"])}
    with ThreadPoolExecutor(arguments.jobs) as pool:
        runs = list(pool.map(lambda name: run(name, base, learns, scratch, arguments.steps), arguments.recipes))
    write(dict(zip(arguments.recipes, runs, strict=True)), arguments.output)
    print((arguments.output / "intent.md").read_text(encoding="utf-8"))


def split(data: Path, folder: Path) -> dict[str, Path]:
    """Rows to train on and rows to hold out, the same at every call."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = data.read_text(encoding="utf-8").splitlines(keepends=True)
    random.Random(0).shuffle(rows)
    parts = {"train": rows[500:], "held_out": rows[:500]}
    for name, text in (("sentences", rows[500:]), ("held_out_sentences", rows[:500])):
        sentences = [json.loads(row)["messages"][0]["content"].partition("： ")[2].partition("\n")[0] for row in text]
        parts[name] = [json.dumps({"text": f"{sentence}\n{sentence}"}) + "\n" for sentence in sentences]
    files = {name: folder / f"{name}.jsonl" for name in parts}
    for name, lines in parts.items():
        files[name].write_text("".join(lines), encoding="utf-8")
    return files


def run(recipe: str, model: Path, keys: dict[str, Any], scratch: Path, steps: int) -> dict[str, Any]:
    """Fine-tune as a user would; returns the summary and the history of the losses."""
    folder = scratch / f"{recipe}-{steps}"
    settings = {"model": str(model), "output_dir": str(folder), "training.max_steps": steps}
    settings |= SETTINGS | keys | {"training.learning_rate": RATES[recipe]}
    if not (folder / "summary.json").is_file():
        command = [sys.executable, "-m", "modeling_deepseek_moe.cli", "finetune", recipe]
        command += [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        log = scratch / f"{recipe}-{steps}.log"
        with log.open("w") as file:
            if subprocess.run(command, env=environment, stdout=file, stderr=file).returncode:
                sys.exit(f"{recipe} failed; {log} says why")
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    losses = [(row["step"], row["loss"]) for row in state["log_history"] if "loss" in row]
    return {"summary": json.loads((folder / "summary.json").read_text(encoding="utf-8")), "losses": losses}


def write(runs: dict[str, dict[str, Any]], folder: Path) -> None:
    """JSON, a table in Markdown and a picture of the losses."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    kept = ("trainable_parameters", "steps", "eval_loss_before", "eval_loss_after")
    kept += ("metric_before", "metric_after", "device", "versions")
    numbers = {
        name: {"losses": run["losses"], **{key: run["summary"][key] for key in kept}} for name, run in runs.items()
    }
    (folder / "intent.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    lines = [
        "| recipe | trained parameters | steps | loss | exact match before | after | right intent before | after |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in numbers.items():
        before, after = row["metric_before"], row["metric_after"]
        lines.append(
            f"| {name} | {row['trainable_parameters']:,} | {row['steps']} | {row['eval_loss_before']:.2f} to "
            f"{row['eval_loss_after']:.3f} | {before['exact_match']:.1%} | {after['exact_match']:.1%} | "
            f"{before['intent']:.1%} | {after['intent']:.1%} |"
        )
    (folder / "intent.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    figure = Figure(figsize=(7, 4))
    FigureCanvasAgg(figure)
    axes = figure.subplots(gridspec_kw={"left": 0.1, "right": 0.97, "bottom": 0.14, "top": 0.96})
    for name, row in numbers.items():
        axes.plot(*zip(*row["losses"], strict=True), label=name)
    axes.set(xlabel="optimizer step", ylabel="training loss", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(folder / "intent.png", format="png", dpi=120)


if __name__ == "__main__":
    main()
