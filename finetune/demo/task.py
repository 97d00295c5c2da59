"""The demo's task, which its base model never saw: `reasoning-gym`'s spell_backward, scored by its own `score_answer`.

`python -m modeling_deepseek_moe.finetune.demo.task MODEL REPORT` loads a model by folder or Hub name in a process of
its own, lets it answer the held-out items and writes the answers and the first logits to REPORT (safetensors).
"""

import functools
import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import reasoning_gym
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import modeling_deepseek_moe  # noqa: F401  (registers the Auto classes)

USER, ASSISTANT = "<|user|>", "<|assistant|>"
DEMO_TASK = "spell_backward"
TRAIN_SEED, HELD_OUT_SEED = 1, 2
HELD_OUT_ITEMS = 256
LONGEST_ANSWER = 16  # tokens


class Split(NamedTuple):
    """Items to learn from and items to be scored on; no question is in both, whatever its letter case."""

    train: list[dict[str, Any]]
    held_out: list[dict[str, Any]]


class Scores(NamedTuple):
    """The task's own mean score (1 for a right answer, a share for some right letters), and how many are all right."""

    mean: float
    right: float
    answers: list[str]


def as_prompt(question: str) -> str:
    """The chat template of the demo's tokenizer for one user turn, written out."""
    return f"{USER}{question}{ASSISTANT}"


@functools.cache
def _dataset(seed: int) -> Any:
    return reasoning_gym.create_dataset(DEMO_TASK, size=10**9, seed=seed)


def split_items(train: int = 0, held_out: int = HELD_OUT_ITEMS) -> Split:
    """The first so many different items of either seed; the held-out ones do not depend on `train`."""
    seen: set[str] = set()
    chosen = list(itertools.islice(_new_items(HELD_OUT_SEED, seen), held_out))
    return Split(list(itertools.islice(_new_items(TRAIN_SEED, seen), train)), chosen)


def _new_items(seed: int, seen: set[str]) -> Iterator[dict[str, Any]]:
    for index in itertools.count():
        item = _dataset(seed)[index]
        if (question := item["question"].lower()) not in seen:
            seen.add(question)
            yield item


def training_row(item: dict[str, Any]) -> dict[str, str]:
    """An item as a row that fine-tuning reads."""
    return {"prompt": as_prompt(item["question"]), "completion": item["answer"]}


def score(items: list[dict[str, Any]], answers: list[str]) -> Scores:
    """Answers judged by the data set's own scorer."""
    points = [_dataset(HELD_OUT_SEED).score_answer(answer, item) for item, answer in zip(items, answers, strict=True)]
    return Scores(sum(points) / len(points), sum(point == 1.0 for point in points) / len(points), answers)


def constant_baseline(split: Split) -> Scores:
    """The best that one and the same answer can do: at every position, the letter most common there in training."""
    answers = [item["answer"].lower() for item in split.train]
    places = itertools.zip_longest(*answers)
    constant = "".join(Counter(filter(None, letters)).most_common(1)[0][0] for letters in places)
    return score(split.held_out, [constant] * len(split.held_out))


def ask(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: list[dict[str, Any]], batch_size: int = 128
) -> Scores:
    """Greedy answers of `model` to `items`, scored."""
    answers: list[str] = []
    model.eval()
    for start in range(0, len(items), batch_size):
        inputs = encode(tokenizer, items[start : start + batch_size])
        with torch.inference_mode():
            tokens = model.generate(**inputs, max_new_tokens=LONGEST_ANSWER, do_sample=False)
        answers += tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return score(items, answers)


def encode(tokenizer: PreTrainedTokenizerBase, items: list[dict[str, Any]]) -> Any:
    """Questions through the chat template, padded on the left: `input_ids` and `attention_mask` `[B, T]`."""
    chats = [[{"role": "user", "content": item["question"]}] for item in items]
    texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    return tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)


def first_logits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: list[dict[str, Any]]) -> Any:
    """Logits `[8, V]` of the first answer token of the first eight items: a fingerprint of the model."""
    model.eval()
    with torch.inference_mode():
        return model(**encode(tokenizer, items[:8])).logits[:, -1].float().contiguous()


def main(name: str, report: str) -> None:
    """Load `name` (folder or Hub name), ask it the held-out items, write answers and first logits to `report`."""
    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(name)
    items = split_items().held_out
    answers = json.dumps(ask(model, tokenizer, items).answers)
    save_file({"logits": first_logits(model, tokenizer, items)}, report, metadata={"answers": answers})


if __name__ == "__main__":
    main(*sys.argv[1:])
