"""One run of a recipe on the demo's base and task, scored by the task's own scorer, in a process of its own.

    python tests/benchmarks/one_recipe.py REQUEST.json ANSWER.json

The request names the `recipe`, its `overrides`, and by `splits` files with what to score on. The answer holds score
and share of right answers of each, trained parameters, seconds a step, and peak memory above what was there before.
"""

import json
import resource
import sys
from pathlib import Path

import torch

from modeling_deepseek_moe import DeepseekMoeForCausalLM
from modeling_deepseek_moe.expert_lora import load_adapter
from modeling_deepseek_moe.finetune.demo import task as demo_task
from modeling_deepseek_moe.finetune.model.load import load
from modeling_deepseek_moe.finetune.recipe.load import load_recipe
from modeling_deepseek_moe.finetune.train import one_run as train


def main(request: Path, answer: Path) -> None:
    asked = json.loads(request.read_text(encoding="utf-8"))
    overrides = [f"{key}={json.dumps(value)}" for key, value in asked["overrides"].items()]
    recipe = load_recipe(asked["recipe"], overrides)
    before = _peak()
    summary = train.run(recipe)
    used = _peak() - before
    if summary["saved_model"]:
        model = DeepseekMoeForCausalLM.from_pretrained(summary["saved_model"], dtype=torch.float32)
        _, tokenizer = load(recipe)
    else:
        model, tokenizer = load(recipe)
        model = load_adapter(model, summary["saved_adapter"])
    result = {"peak_memory": used}
    for split, items in asked["splits"].items():
        scores = demo_task.ask(model, tokenizer, json.loads(Path(items).read_text(encoding="utf-8")))
        result[split] = {"score": scores.mean, "right": scores.right}
    result |= {
        key: summary[key] for key in ("trainable_parameters", "seconds_per_step", "eval_loss_after", "versions")
    }
    answer.write_text(json.dumps(result), encoding="utf-8")


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
