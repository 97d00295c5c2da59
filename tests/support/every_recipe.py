"""Runs every shipped recipe on a tiny model, from YAML to a repository of the Hub, and loads each back by its name.

    python tests/support/every_recipe.py FOLDER REPORT.json

in the environment of a local Hub. REPORT gets, by recipe, the run's summary, the files that were pushed, and how far
the logits of the model loaded by name are from those of the model in training.
"""

import json
import sys
from pathlib import Path

import torch
from huggingface_hub import HfApi
from tiny import tiny_ids
from tiny_run import counting_rows, tiny_base, write_jsonl

from modeling_deepseek_moe import DeepseekMoeForCausalLM
from modeling_deepseek_moe.expert_lora import load_adapter
from modeling_deepseek_moe.finetune.model.esft_adapter import load_esft_adapter
from modeling_deepseek_moe.finetune.model.load import load
from modeling_deepseek_moe.finetune.recipe.load import SHIPPED, load_recipe
from modeling_deepseek_moe.finetune.train import one_run as train

# What a tiny float32 model on a CPU needs; targets, methods and the rest are the recipe's own.
TINY = {
    "max_length": 32,
    "dtype": "float32",
    "eval_fraction": 0.25,
    "training.max_steps": 3,
    "training.per_device_train_batch_size": 4,
    "training.gradient_accumulation_steps": 1,
    "training.learning_rate": 1e-2,
    "training.warmup_steps": 0,
    "training.logging_steps": 1,
    "training.save_steps": 2,
    "training.bf16": False,
    "training.disable_tqdm": True,
}


def main(folder: Path, report: Path) -> None:
    torch.manual_seed(0)
    base = tiny_base(folder / "base")
    pairs = [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": " w0 w0 w0"}
        for row in counting_rows("prompt")
    ]
    rows = {
        "messages": write_jsonl(folder / "messages.jsonl", counting_rows("messages")),
        "text": write_jsonl(folder / "text.jsonl", counting_rows("text")),
        "preferences": write_jsonl(folder / "preferences.jsonl", pairs),
    }
    in_training = {}
    real_save = train.save

    def save(trainer, *args, **kwargs):
        model = trainer.accelerator.unwrap_model(trainer.model).eval()
        in_training["logits"] = logits_of(model)
        return real_save(trainer, *args, **kwargs)

    train.save = save
    found = {}
    for name in SHIPPED:
        kind = {"dpo": "preferences", "continue_pretraining": "text"}.get(name, "messages")
        values = {
            **TINY,
            "model": base,
            "data": rows[kind],
            "output_dir": folder / name,
            "hub_id": f"me/{name.replace('_', '-')}",
        }
        recipe = load_recipe(name, [f"{key}={value}" for key, value in values.items()])
        summary = train.run(recipe)
        pulled = logits_of(load_by_name(recipe))
        found[name] = {
            "summary": summary,
            "files": HfApi().list_repo_files(recipe.hub_id),
            "difference": float((pulled - in_training["logits"]).abs().max()),
            "moved": float((pulled - logits_of(load(recipe)[0])).abs().max()),
        }
    report.write_text(json.dumps(found), encoding="utf-8")


def load_by_name(recipe):
    if recipe.lora:
        return load_adapter(load(recipe)[0], recipe.hub_id)
    if recipe.esft:
        return load_esft_adapter(load(recipe)[0], recipe.hub_id)
    return DeepseekMoeForCausalLM.from_pretrained(recipe.hub_id)


def logits_of(model):
    model.eval()
    with torch.no_grad():
        return model(tiny_ids(model.config)).logits.float()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
