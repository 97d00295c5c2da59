"""A tiny tokenizer, base model and data file for the fine-tuning tests; nothing is downloaded."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_config, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback

from modeling_deepseek_moe.finetune.train.trainer import RunTrainerMixin

HUB_TOKEN = "hf_secretsecretsecret"  # of a local Hub, which takes any
SPECIAL = ["<s>", "</s>", "<pad>", "<unk>", "<user>", "<bot>"]
WORDS = [f"w{number}" for number in range(80)]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'assistant' %} <bot> {{ m.content }} {{ eos_token }}{% else %} <user> {{ m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %} <bot>{% endif %}"
)


def tiny_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token a word `w0` ... `w79`; BOS is 0, EOS 1, padding 2, and only a chat template writes BOS."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **names)


def full(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a recipe that trains all weights."""
    return {key: value for key, value in values.items() if not key.startswith("lora")}


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def counting_rows(kind: str, count: int = 24) -> list[dict[str, Any]]:
    """Rows of one kind in which the words count upwards: something a tiny model begins to learn at once."""
    rows = []
    for i in range(count):
        start = (7 * i) % 70
        prompt, answer = f"w{start} w{start + 1}", f"w{start + 2} w{start + 3} w{start + 4}"
        rows.append(
            {
                "messages": {
                    "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
                },
                "prompt": {"prompt": prompt, "completion": f" {answer}"},
                "text": {"text": f"{prompt} {answer}"},
            }[kind]
        )
    return rows


def tiny_base(folder: Path, lineage: str = "v3", **overrides: Any) -> Path:
    """A saved random model of a lineage, with the tiny tokenizer."""
    tiny_model(tiny_config(lineage, pad_token_id=2, **overrides)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_values(folder: Path, base: Path, kind: str = "prompt", **overrides: Any) -> dict[str, Any]:
    """Recipe values of a run of a few steps in `folder/run`."""
    return {
        "model": str(base),
        "data": str(write_jsonl(folder / "rows.jsonl", counting_rows(kind))),
        "output_dir": str(folder / "run"),
        "max_length": 32,
        "eval_fraction": 0.25,
        "lora.targets": ["all"],
        "lora.r": 4,
        "training.max_steps": 6,
        "training.per_device_train_batch_size": 6,
        "training.learning_rate": 0.01,
        "training.logging_steps": 1,
        "training.save_steps": 2,
        "training.disable_tqdm": True,
        **overrides,
    }


class StopAt(TrainerCallback):
    """Ctrl-C during a step."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@contextlib.contextmanager
def stopped_at(step: int, saying: str = "") -> Iterator[None]:
    """Every run in it is stopped as by Ctrl-C after `step` steps, and ends by a KeyboardInterrupt that says so."""
    real = RunTrainerMixin.__init__

    def patched(self, *args, callbacks, **kwargs):
        real(self, *args, callbacks=[*callbacks, StopAt(step)], **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt, match=saying):
        patch.setattr(RunTrainerMixin, "__init__", patched)
        yield
