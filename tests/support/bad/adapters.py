"""Adapters that are damaged, or made to do harm."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .models import header
from .trying import Case

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FIELDS = {
    "r is a word": {"r": "16"},
    "r of zero": {"r": 0},
    "r below zero": {"r": -4},
    "r is half": {"r": 2.5},
    "r beyond memory": {"r": 10**12},
    "r is a list": {"r": [4]},
    "r is true": {"r": True},
    "another r": {"r": 5},
    "alpha of zero": {"lora_alpha": 0},
    "alpha is a word": {"lora_alpha": "8"},
    "alpha is none": {"lora_alpha": float("nan")},
    "infinite alpha": {"lora_alpha": float("inf")},
    "a broken pattern": {"rank_pattern": {"(": 4}},
    "a pattern without end": {"rank_pattern": {"(a+)+$": 4, "(.*)*$": 4, r"(\w+\.?)+x": 4}},
    "an alpha pattern without end": {"alpha_pattern": {r"((\w|\.)+)+x": 4}},
    "a choice without end": {"rank_pattern": {"(q|q_|q_p|.*)" * 20: 4}},
    "a pattern's rank is a word": {"rank_pattern": {"q_proj": "4"}},
    "patterns are a list": {"rank_pattern": ["q_proj"]},
    "targets without end": {"target_modules": r"((\w+)+\.?)+x"},
    "targets that are no pattern": {"target_modules": "("},
    "targets are a number": {"target_modules": 7},
    "targets of another model": {"target_modules": ["query_key_value"]},
    "layers without end": {"layers_pattern": r"(\w+)+x", "layers_to_transform": [0]},
    "unknown method": {"peft_type": "MAGIC"},
    "method is a list": {"peft_type": ["LORA"]},
    "no method": {"peft_type": None},
    "tokens before the prompt": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4},
    "rslora is a word": {"use_rslora": "maybe"},
    "saved modules are a word": {"modules_to_save": "lm_head"},
}
FILES = {
    "empty config": lambda folder: (folder / CONFIG).write_text(""),
    "config is a list": lambda folder: (folder / CONFIG).write_text("[]"),
    "deep config": lambda folder: (folder / CONFIG).write_text("[" * 100_000),
    "a key twice": lambda folder: (folder / CONFIG).write_text('{"peft_type": "LORA", "r": 4, "r": 8}'),
    "no config": lambda folder: (folder / CONFIG).unlink(),
    "no weights": lambda folder: (folder / WEIGHTS).unlink(),
    "a pickle": lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"),
    "empty weights": lambda folder: (folder / WEIGHTS).write_bytes(b""),
    "weights cut off": lambda folder: os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 7),
    "a tensor twice": lambda folder: _header(folder, _twice),
    "NaN": lambda folder: _change(folder, lambda t: next(iter(t.values())).view(-1)[:1].fill_(float("nan"))),
    "infinity": lambda folder: _change(folder, lambda t: next(iter(t.values())).view(-1)[:1].fill_(float("inf"))),
    "another shape": lambda folder: _change(folder, lambda t: t.update({next(iter(t)): torch.ones(4, 3)})),
    "a tensor of no layer": lambda folder: _change(folder, _renamed),
}
ESFT = {
    "experts are a list": '{"experts": [1], "shared_experts": false, "non_expert_modules": false}',
    "an expert that is none": '{"experts": {"1": [99]}, "shared_experts": false, "non_expert_modules": false}',
    "a layer that is none": '{"experts": {"99": [0]}, "shared_experts": false, "non_expert_modules": false}',
    "cut off": '{"experts": {',
    "deep": "[" * 100_000,
}
VERBS = {
    "chat": ["chat", "{base}", "--adapter", "{folder}/adapter", "--max-new-tokens", "2"],
    "convert": ["convert", "{base}", "{folder}/out", "--to", "bf16", "--adapter", "{folder}/adapter"],
}


def adapter_cases() -> Iterator[Case]:
    """For `chat`, and so every verb that puts an adapter on a model, and `convert`, which merges it."""
    damages = {name: (lambda folder, changes=changes: _fields(folder, changes)) for name, changes in FIELDS.items()}
    for name, damage in {**damages, **FILES}.items():
        for verb, arguments in VERBS.items():
            if (verb, name) in _FINE:
                continue
            yield Case(f"{verb}, adapter: {name}", arguments, _prepared(damage), stdin="w1\n")
    for name, content in ESFT.items():
        for verb, arguments in VERBS.items():
            yield Case(f"{verb}, ESFT: {name}", arguments, _esft(content), stdin="w1\n")


RUN = {
    "recipe.yaml: deep": ("recipe.yaml", "model: " + "[" * 5000),
    "recipe.yaml: aliases": ("recipe.yaml", "model: &a [x]\ndata: *a"),
    "recipe.yaml: a list": ("recipe.yaml", "- model"),
    "recipe.yaml: empty": ("recipe.yaml", ""),
    "recipe.yaml: binary": ("recipe.yaml", "\0"),
    "summary.json: deep": ("summary.json", "[" * 100_000),
    "summary.json: a list": ("summary.json", "[]"),
    "summary.json: empty": ("summary.json", ""),
    "data.json: deep": ("data.json", "[" * 100_000),
    "data.json: a list": ("data.json", "[]"),
}


def run_cases() -> Iterator[Case]:
    """Folders of runs that somebody else made, for `push`."""
    for name, (file, content) in RUN.items():

        def prepare(folder: Path, places: dict[str, Path], file=file, content=content) -> None:
            shutil.copytree(places["adapter"], folder / "run" / "adapter")
            (folder / "run" / "recipe.yaml").write_text("model: me/base\ndata: rows.jsonl\n")
            (folder / "run" / "summary.json").write_text('{"saved_adapter": "adapter"}')
            (folder / "run" / "data.json").write_text('{"value": {}, "sha256": "x"}')
            (folder / "run" / file).write_text(content)

        yield Case(
            f"push: {name}", ["push", "{folder}/run", "--to", "me/x"], prepare, says=f"{file.partition('.')[0]}"
        )


# A merge does not ask which modules PEFT would look for, but takes the tensors for what they are called.
_FINE = {("convert", "targets of another model")}


def save_adapter(base: Path, folder: Path) -> Path:
    """A random adapter for the attention of a model."""
    from peft import get_peft_model

    from modeling_deepseek_moe import DeepseekMoeForCausalLM
    from modeling_deepseek_moe.finetune import lora_config

    model = DeepseekMoeForCausalLM.from_pretrained(base)
    get_peft_model(model, lora_config(model, targets=["attention"], r=4, lora_alpha=8)).save_pretrained(folder)
    return folder


def _prepared(damage):
    def prepare(folder: Path, places: dict[str, Path]) -> None:
        shutil.copytree(places["adapter"], folder / "adapter")
        damage(folder / "adapter")

    return prepare


def _esft(content: str):
    def prepare(folder: Path, places: dict[str, Path]) -> None:
        (folder / "adapter").mkdir()
        save_file({"model.norm.weight": torch.ones(32)}, folder / "adapter" / "model.safetensors")
        (folder / "adapter" / "expert_cfg.json").write_text(content)

    return prepare


def _fields(folder: Path, changes: dict) -> None:
    found = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(found | changes))


def _change(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def _renamed(tensors: dict) -> None:
    name = next(iter(tensors))
    tensors[name.replace("layers.0", "layers.77")] = tensors.pop(name)


def _header(folder: Path, change) -> None:
    header(change, WEIGHTS)(folder)


def _twice(found: bytes) -> bytes:
    name, entry = next(item for item in json.loads(found).items() if item[0] != "__metadata__")
    return found.rstrip()[:-1] + f', "{name}": {json.dumps(entry)}}}'.encode()
