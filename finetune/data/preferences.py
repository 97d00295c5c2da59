"""Preference rows to token ids: a prompt, and two answers of which one is preferred.

{"prompt": "...", "chosen": "...", "rejected": "..."}                               text, BOS in front, EOS behind
{"prompt": [messages], "chosen": "..." or [one message], "rejected": ...}           by the chat template
{"chosen": [messages], "rejected": [messages]}                                      alike but for the last answer
"""

from typing import Any

from transformers import PreTrainedTokenizerBase

from .chat import IGNORED, cut_away, first_tokens, too_long
from .forms import known_form
from .messages import checked_messages, checked_object, keys_of
from .report import RowError
from .words import words_of

_SIDES = ("chosen", "rejected")
_FORMS = (
    "a preference row has `prompt`, `chosen` and `rejected`: text, or messages that differ in the last one, the "
    "assistant's"
)


def encode_preference(
    row: Any, tokenizer: PreTrainedTokenizerBase, max_length: int, long_rows: str, split_special_tokens: bool = True
) -> tuple[list[dict[str, list[int]]], str | None]:
    """A row's `prompt_ids`, `chosen_ids` and `rejected_ids`, as `encode_fitting` does; answers are cut, prompts not.

    Raises:
        RowError: the row is no preference; with `long_rows` "skip" or "stop", also that it is too long.
    """
    row, _ = known_form(checked_object(row))
    words = words_of(tokenizer, split_special_tokens)
    prompts, answers, is_whole = [], [], True
    for side in _as_learned(row):
        ids, labels, whole = first_tokens(side, words, max_length)
        start = next((i for i, label in enumerate(labels) if label != IGNORED), len(labels))
        if IGNORED in labels[start:]:
            raise RowError("`chosen` and `rejected` are one answer each", "no preference")
        prompts.append(ids[:start])
        answers.append(ids[start:])
        is_whole = is_whole and whole
    if prompts[0][:max_length] != prompts[1][:max_length]:
        raise RowError("`chosen` and `rejected` do not answer the same prompt", "no preference")
    if answers[0] == answers[1] and is_whole:
        raise RowError("`chosen` and `rejected` are alike", "no preference")
    room, longest = max_length - len(prompts[0]), max(map(len, answers))
    is_long = longest > room or not is_whole
    if is_long and long_rows in ("skip", "stop"):
        raise too_long(max_length)
    if room < 1 or answers[0][:room] == answers[1][:room]:
        raise cut_away(max_length)
    chosen, rejected = (answer[:room] for answer in answers)
    return [{"prompt_ids": prompts[0], "chosen_ids": chosen, "rejected_ids": rejected}], "cut" if is_long else None


def _as_learned(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Two rows as `rows.py` reads them, each of which learns one side's answer and nothing else."""
    prompt = row.get("prompt")
    if isinstance(prompt, str) and all(isinstance(row.get(side), str) for side in _SIDES):
        for side in _SIDES:
            if not row[side].strip():
                raise RowError(f"`{side}` is empty", "empty")
        return [{"prompt": prompt, "completion": row[side]} for side in _SIDES]
    if any(side not in row for side in _SIDES) or isinstance(prompt, str):
        raise RowError(f"{_FORMS}; this one has {keys_of(row)}", "of no known kind")
    before = checked_messages(prompt, "prompt") if prompt else []
    talks = []
    for side in _SIDES:
        answer = row[side]
        answer = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
        talks.append([*before, *checked_messages(answer, side)])
    if talks[0][:-1] != talks[1][:-1] or any(talk[-1]["role"] != "assistant" for talk in talks) or len(talks[0]) < 2:
        raise RowError(f"{_FORMS}: these do not", "no preference")
    return [
        {"messages": [*({**m, "mask": 1} for m in talk[:-1]), {**talk[-1], "mask": 0}], "tools": row.get("tools")}
        for talk in talks
    ]
