"""`deepseek-moe demo`: fine-tune, score, merge, publish and load back a tiny DeepSeekMoE model on this machine.

The base in `model_cards/demo_base` really was pretrained, by the scripts in its folder; the task, which it never saw,
is in `task.py`; the fine-tuning is `train.run` with `recipes/demo.yaml`, as for any other model.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_token
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import modeling_deepseek_moe  # noqa: F401  (registers the Auto classes)
from modeling_deepseek_moe.expert_lora import load_adapter

from ..errors import UserError
from ..files import check_replaceable, write_text
from ..hub import upload as publish
from ..hub.push import push_run
from ..model.lora import known_warnings
from ..recipe.load import load_recipe
from ..train import one_run as train
from . import task as demo_task
from .local_hub import LocalHub
from .task import Scores

TRAIN_ITEMS = 9_900  # one epoch of the recipe's 300 steps, after the held-out share
LOCAL_NAME = "local/deepseek-moe-demo"
# Same weights, same machine; only the order of float32 sums differs between merged and unmerged forms.
SAME_LOGITS = 1e-3


def base_folder() -> Path:
    """The folder of the pretrained base that the package ships."""
    return Path(str(resources.files("modeling_deepseek_moe.model_cards") / "demo_base"))


def run_demo(output_dir: str | os.PathLike[str] | None = None, hub_id: str | None = None) -> dict[str, Any]:
    """Run the whole demo and print what it did.

    Args:
        output_dir: folder for everything it writes; a new temporary folder by default.
        hub_id: push to this repository of the real Hub (needs `hf auth login`) instead of to a local server.

    Returns:
        What is also in `demo.json`: mean scores and shares of right answers (`baseline`, `before`, `after`,
        `reloaded`, `pulled`, each a dict of `score` and `right`), `seconds`, and where things are.

    Raises:
        UserError: no token, the Hub refuses, or a model that was loaded back does not answer as it did before.
    """
    if hub_id and get_token() is None:
        raise UserError(f"no token to write to {hub_id!r}: run `hf auth login`, or leave it out for a local Hub")
    started = time.monotonic()
    console = Console()
    folder = Path(output_dir) if output_dir else Path(tempfile.mkdtemp(prefix="deepseek-moe-demo-"))
    folder.mkdir(parents=True, exist_ok=True)
    base = base_folder()
    items, rows = demo_task.split_items(TRAIN_ITEMS), folder / "train.jsonl"
    lines = "".join(json.dumps(demo_task.training_row(item)) + "\n" for item in items.train)
    check_replaceable([rows, folder / "demo.json"], lambda: rows.is_file() and rows.read_text("utf-8") == lines)
    with open_hub(folder, hub_id) as (name, environment, access):
        publish.make_repo(name, private=bool(hub_id), **access)
        write_text(rows, lines)
        tokenizer = AutoTokenizer.from_pretrained(base)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        scores = {"baseline": demo_task.constant_baseline(items)}
        scores["before"] = demo_task.ask(model, tokenizer, items.held_out)
        console.print(f"Base: {model.num_parameters():,} parameters. Question: {items.held_out[0]['question']!r}")

        overrides = {"model": base, "data": rows, "output_dir": folder / "run"}
        recipe = load_recipe(
            Path(__file__).parents[1] / "recipes" / "demo.yaml", [f"{key}={value}" for key, value in overrides.items()]
        )
        run = train.run(recipe)

        with known_warnings():
            adapted = load_adapter(model, run["saved_adapter"])
        scores["after"] = demo_task.ask(adapted, tokenizer, items.held_out)
        logits = demo_task.first_logits(adapted, tokenizer, items.held_out)
        merged = AutoModelForCausalLM.from_pretrained(run["saved_model"], dtype="auto")
        scores["reloaded"] = demo_task.ask(merged, tokenizer, items.held_out)
        check_same(
            "the merged model", scores, "reloaded", logits, demo_task.first_logits(merged, tokenizer, items.held_out)
        )

        address = push_run(folder / "run", name, private=bool(hub_id), **access)
        answers, pulled_logits = ask_by_name(name, environment, folder / "pulled.safetensors")
        scores["pulled"] = demo_task.score(items.held_out, answers)
        check_same(f"{name} from the Hub", scores, "pulled", logits, pulled_logits)

    summary: dict[str, Any] = {key: {"score": result.mean, "right": result.right} for key, result in scores.items()}
    summary |= {"adapter": run["saved_adapter"], "model": run["saved_model"]}
    summary["hub"] = address if hub_id else str(folder / "hub")
    summary |= {"loss_curve": str(folder / "run" / "loss.png"), "seconds": round(time.monotonic() - started, 1)}
    (folder / "demo.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    report(console, items.held_out, scores, summary)
    return summary


@contextlib.contextmanager
def open_hub(folder: Path, hub_id: str | None) -> Iterator[tuple[str, dict[str, str], dict[str, Any]]]:
    """The repository to push to, the environment of a process that loads from it, and the Hub's address and token."""
    if hub_id:
        # The login stays where it is; an empty cache proves that the files came from the Hub.
        yield hub_id, {**os.environ, "HF_HUB_CACHE": str(folder / "hf_cache")}, {"endpoint": None, "token": None}
        return
    with LocalHub(folder / "hub") as hub:
        yield LOCAL_NAME, hub.environment(folder / "hf_home"), {"endpoint": hub.endpoint, "token": "local"}


def ask_by_name(name: str, environment: dict[str, str], report: Path) -> tuple[list[str], torch.Tensor]:
    """Answers and first logits of a model that a new process loads from the Hub by its name."""
    command = [sys.executable, "-m", "modeling_deepseek_moe.finetune.demo.task", name, str(report)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or "no message").splitlines()[-1]
        raise UserError(f"loading {name} from the Hub in a new process failed: {reason}")
    with safe_open(report, "pt") as file:
        return json.loads(file.metadata()["answers"]), file.get_tensor("logits")


def check_same(what: str, scores: dict[str, Scores], key: str, logits: torch.Tensor, others: torch.Tensor) -> None:
    """Raise a UserError if a loaded model scores or computes otherwise than the fine-tuned one."""
    difference = float((logits - others).abs().max())
    if scores[key].mean != scores["after"].mean or difference > SAME_LOGITS:
        raise UserError(
            f"{what} is not the model that was trained: score {scores[key].mean:.3f} instead of "
            f"{scores['after'].mean:.3f}, logits differ by up to {difference:.2g}"
        )


def report(console: Console, items: list[dict[str, Any]], scores: dict[str, Scores], summary: dict[str, Any]) -> None:
    """Prints the closing tables: scores, some answers, and where everything is."""
    names = {
        "baseline": "best constant answer",
        "before": "base, before",
        "after": "with LoRA, after",
        "reloaded": "merged, saved, loaded back",
        "pulled": "pulled from the Hub by name",
    }
    table = Table(title=f"{demo_task.DEMO_TASK}: {len(items)} words it never saw")
    table.add_column("model")
    table.add_column("score (its own scorer)", justify="right")
    table.add_column("exactly right", justify="right")
    for key, name in names.items():
        style = "bold green" if key == "after" else None
        table.add_row(name, f"{scores[key].mean:.3f}", f"{scores[key].right:.1%}", style=style)
    console.print(table)

    table = Table("word", "before", "after", title="Some answers")
    for number in range(5):
        row = (scores[key].answers[number].replace("\n", " ") for key in ("before", "after"))
        table.add_row(items[number]["metadata"]["word"], *row)
    console.print(table)

    table = Table(title=f"Saved ({summary['seconds']} s in all)", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")  # a path must be there whole
    hub = "Hub" if summary["hub"].startswith("http") else "local Hub's files"
    for key, name in {"adapter": "adapter", "model": "merged model", "loss_curve": "loss curve", "hub": hub}.items():
        table.add_row(name, summary[key])
    console.print(table)
