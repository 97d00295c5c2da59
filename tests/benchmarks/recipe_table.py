"""All recipes on the demo's base and task: what each trains, holds and costs, and how well the task is learned.

    python tests/benchmarks/recipe_table.py --scratch DIR [--recipes lora_all full] [--jobs 2]

Each recipe is run as it ships, with the demo's model, rows and lengths. Its learning rate is the one of three (doubled
for as long as that helps) that does best on validation words with seed 0; that one is run with three seeds and scored
on test words, which no run learned from and no choice looked at. `dpo` starts from a model that `lora_all` taught for
half of the steps, and learns to prefer right spellings to wrong ones. Runs that DIR holds already are not run again.

Writes recipes.json, recipes.md and recipes.png to tests/benchmarks/results.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
ITEMS = 256  # words to score on
STEPS, BATCH = 100, 32
PACKED_BATCH = 10  # sequences of 128 tokens: about as many tokens as 32 rows have
LORA_RATES, FULL_RATES, DPO_RATES = (3e-3, 6e-3, 1e-2), (1e-3, 2e-3, 4e-3), (1e-4, 3e-4, 1e-3)
RATES = {
    "lora_attention": LORA_RATES,
    "lora_shared": LORA_RATES,
    "lora_routed": LORA_RATES,
    "lora_all": LORA_RATES,
    "qlora_experts": LORA_RATES,
    "esft_token": FULL_RATES,
    "esft_gate": FULL_RATES,
    "full": FULL_RATES,
    "continue_pretraining": FULL_RATES,
    "dpo": DPO_RATES,
}
# What a model of this size on a machine without a GPU needs; the rest is the recipe's own.
COMMON = {
    "max_length": 128,
    "dtype": "float32",
    "gradient_checkpointing": False,
    "training.max_steps": STEPS,
    "training.per_device_train_batch_size": BATCH,
    "training.gradient_accumulation_steps": 1,
    "training.lr_scheduler_type": "cosine",
    "training.warmup_steps": 10,
    "training.weight_decay": 0.0,
    "training.logging_steps": 10,
    "training.save_strategy": "no",
    "training.bf16": False,
    "training.use_cpu": True,
    "training.disable_tqdm": True,
    "eval_fraction": 0.02,
}
MERGED = ("lora_attention", "lora_shared", "lora_routed", "lora_all", "esft_token", "esft_gate", "dpo")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--recipes", nargs="+", choices=RATES, default=list(RATES))
    parser.add_argument("--jobs", type=int, default=2, help="runs beside each other, one thread each")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--output", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    bench = Bench(arguments.scratch.resolve(), arguments.jobs, arguments.steps)
    results = bench.measure(arguments.recipes)
    write(results, arguments.output)
    print((arguments.output / "recipes.md").read_text(encoding="utf-8"))


class Bench:
    """Runs recipes in `scratch`, a few at a time, each once."""

    def __init__(self, scratch: Path, jobs: int, steps: int):
        from modeling_deepseek_moe.finetune.demo.one_demo import base_folder

        self.scratch, self.jobs, self.steps, self.base = scratch, jobs, steps, base_folder()
        self.files = write_rows(scratch, 2 * steps * BATCH)

    def measure(self, recipes: Iterable[str]) -> dict[str, Any]:
        """Rates, and for the best of each recipe the runs of all seeds."""
        recipes = list(recipes)
        if "dpo" in recipes:
            self.run("lora_all", LORA_RATES[0], 0, steps=self.steps // 2)
        rates = {recipe: list(RATES[recipe]) for recipe in recipes}
        scores: dict[str, dict[float, float]] = {recipe: {} for recipe in recipes}
        while wanted := [(r, rate) for r in recipes for rate in rates[r] if rate not in scores[r]]:
            found = self.all((recipe, rate, 0) for recipe, rate in wanted)
            for (recipe, rate), result in zip(wanted, found, strict=True):
                scores[recipe][rate] = result["validation"]["score"]
            chosen = {recipe: max(scores[recipe], key=scores[recipe].get) for recipe in recipes}
            for recipe in recipes:
                if chosen[recipe] == max(rates[recipe]):
                    rates[recipe].append(2 * chosen[recipe])
        runs = self.all((recipe, chosen[recipe], seed) for recipe in recipes for seed in SEEDS)
        rows = {
            recipe: {
                "learning_rate": chosen[recipe],
                "validation": {str(rate): score for rate, score in scores[recipe].items()},
                "runs": runs[len(SEEDS) * number : len(SEEDS) * (number + 1)],
            }
            for number, recipe in enumerate(recipes)
        }
        base = self.base_scores()
        if "dpo" not in recipes:
            base.pop("before dpo", None)
        return {"base": base, "steps": self.steps, "batch": BATCH, "recipes": rows}

    def all(self, wanted: Iterable[tuple[str, float, int]]) -> list[dict[str, Any]]:
        with ThreadPoolExecutor(self.jobs) as pool:
            return list(pool.map(lambda run: self.run(*run), wanted))

    def run(self, recipe: str, rate: float, seed: int, steps: int | None = None) -> dict[str, Any]:
        steps = steps or self.steps
        name = f"{recipe}-{steps}-{rate}-{seed}"
        answer = self.scratch / f"{name}.json"
        if not answer.is_file():
            request = self.scratch / f"{name}.request.json"
            model = self.taught() if recipe == "dpo" else self.base
            kind = {"dpo": "preferences", "continue_pretraining": "texts"}.get(recipe, "prompts")
            overrides = COMMON | {
                "model": str(model),
                "data": str(self.files[kind]),
                "output_dir": str(self.scratch / name),
                "overwrite": True,
                "seed": seed,
                "training.max_steps": steps,
                "training.learning_rate": rate,
            }
            overrides |= {"merge": True} if recipe in MERGED else {}
            if recipe == "continue_pretraining":
                overrides["training.per_device_train_batch_size"] = PACKED_BATCH
            splits = {split: str(self.files[split]) for split in ("validation", "test")}
            asked = {"recipe": recipe, "overrides": overrides, "splits": splits}
            request.write_text(json.dumps(asked), encoding="utf-8")
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
            done = subprocess.run(
                [sys.executable, str(HERE / "one_recipe.py"), str(request), str(answer)],
                env=environment,
                capture_output=True,
                text=True,
            )
            if done.returncode:
                sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
            print(f"{name}: {json.loads(answer.read_text())['validation']['score']:.3f}", flush=True)
        return json.loads(answer.read_text(encoding="utf-8"))

    def taught(self) -> Path:
        """The model that `dpo` starts from."""
        return self.scratch / f"lora_all-{self.steps // 2}-{LORA_RATES[0]}-0" / "model"

    def base_scores(self) -> dict[str, float]:
        answer = self.scratch / "base.json"
        if not answer.is_file():
            from transformers import AutoModelForCausalLM, AutoTokenizer

            from modeling_deepseek_moe.finetune.demo import task as demo_task

            items = json.loads(self.files["test"].read_text(encoding="utf-8"))
            models = {"base": self.base} | ({"before dpo": self.taught()} if self.taught().is_dir() else {})
            scores = {}
            for name, folder in models.items():
                model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
                found = demo_task.ask(model, AutoTokenizer.from_pretrained(folder), items)
                scores[name] = {"score": found.mean, "right": found.right}
            answer.write_text(json.dumps(scores), encoding="utf-8")
        return json.loads(answer.read_text(encoding="utf-8"))


def write_rows(folder: Path, count: int) -> dict[str, Path]:
    """Rows of every kind for the same words, and the words to score on."""
    from modeling_deepseek_moe.finetune.demo import task as demo_task

    items = demo_task.split_items(count + ITEMS, ITEMS)
    train, validation = items.train[:-ITEMS], items.train[-ITEMS:]
    rows = [demo_task.training_row(item) for item in train]
    kinds = {
        "prompts": rows,
        "texts": [{"text": row["prompt"] + row["completion"]} for row in rows],
        "preferences": [
            {"prompt": row["prompt"], "chosen": row["completion"], "rejected": misspelt(row["completion"], number)}
            for number, row in enumerate(rows)
        ],
    }
    files = {}
    for kind, lines in kinds.items():
        files[kind] = folder / f"{kind}.jsonl"
        files[kind].write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    for split, words in (("validation", validation), ("test", items.held_out)):
        files[split] = folder / f"{split}.json"
        files[split].write_text(json.dumps(words), encoding="utf-8")
    return files


def misspelt(answer: str, seed: int) -> str:
    """The answer with two different letters exchanged, or one doubled where there are none."""
    order = list(range(len(answer) - 1))
    random.Random(seed).shuffle(order)
    for place in order:
        if answer[place] != answer[place + 1]:
            return answer[:place] + answer[place + 1] + answer[place] + answer[place + 2 :]
    return answer + answer[-1:]


def write(results: dict[str, Any], folder: Path) -> None:
    """JSON, a table in Markdown and a picture."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipes.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    lines = [
        "| recipe | trained parameters | learning rate | score, mean of 3 seeds | right | s a step | memory |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {name} | | | {scores['score']:.3f} | {scores['right']:.1%} | | |"
            for name, scores in results["base"].items()
        ),
    ]
    for recipe, row in results["recipes"].items():
        runs = row["runs"]
        scores = [run["test"]["score"] for run in runs]
        lines.append(
            f"| {recipe} | {runs[0]['trainable_parameters']:,} | {row['learning_rate']:g} | {mean(scores):.3f} "
            f"({min(scores):.3f} to {max(scores):.3f}) | {mean(run['test']['right'] for run in runs):.1%} | "
            f"{statistics.median(run['seconds_per_step'] for run in runs):.2f} | "
            f"{statistics.median(run['peak_memory'] for run in runs) / 1e6:.0f} MB |"
        )
    (folder / "recipes.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw(results, folder / "recipes.png")


def mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def draw(results: dict[str, Any], path: Path) -> None:
    """The score of each recipe, a dot for each seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(results["recipes"])
    figure = Figure(figsize=(8, 0.55 * len(names) + 1.4))
    FigureCanvasAgg(figure)
    axes = figure.subplots(gridspec_kw={"left": 0.24, "right": 0.97, "bottom": 0.13, "top": 0.95})
    for place, name in enumerate(names):
        scores = [run["test"]["score"] for run in results["recipes"][name]["runs"]]
        axes.barh(place, mean(scores), color="tab:blue", alpha=0.35)
        axes.plot(scores, [place] * len(scores), "o", color="tab:blue", markersize=5)
    axes.axvline(results["base"]["base"]["score"], color="grey", linestyle="--", linewidth=1, label="base")
    if "before dpo" in results["base"]:
        score = results["base"]["before dpo"]["score"]
        axes.axvline(score, color="tab:orange", linestyle=":", linewidth=1.5, label="where dpo starts")
    axes.set(yticks=range(len(names)), yticklabels=names, xlim=(0, 1.02))
    axes.set_xlabel("score of the task's own scorer on words never seen (dots: seeds, bar: mean)")
    axes.invert_yaxis()
    axes.legend(loc="lower right")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, format="png", dpi=120)


if __name__ == "__main__":
    main()
