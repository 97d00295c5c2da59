"""Greedy answers of a model to the questions of training rows.

A row's question is everything before the last part that is learned from it (the last turn of the assistant, the
completion), in the very tokens that training shows; its reference is that part. Rows of plain text ask nothing.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.chat import IGNORED, encode_whole
from ..data.sources import open_rows
from ..data.templates import render_chat
from ..errors import UserError
from ..progress import counting_bar

_MARK = "\ue000"  # a character of Unicode's private use area: in no text


class Question(NamedTuple):
    """What a model is asked, and what it should say."""

    prompt: list[int]
    reference: list[int]


def question_of(ids: list[int], labels: list[int], bos: int | None) -> Question | None:
    """The question of a tokenized row; None if nothing but BOS precedes what is learned.

    Args:
        ids: token ids, uncut.
        labels: the same where a token is learned, else -100.
        bos: id of BOS, None if there is none.
    """
    learned = [label != IGNORED for label in labels]
    if True not in learned:
        return None
    end = len(learned) - learned[::-1].index(True)
    start = end - learned[:end][::-1].index(False) if False in learned[:end] else 0
    return Question(ids[:start], ids[start:end]) if ids[:start] not in ([], [bos]) else None


def questions_of(source: str, split: str, tokenizer: PreTrainedTokenizerBase, limit: int | None) -> list[Question]:
    """The questions of a JSONL file or a Hub data set.

    Args:
        split: which split of a Hub data set.
        limit: the most rows to take, evenly spread; None for all.

    Raises:
        UserError: no such data, a row that cannot be read (with its line), or rows that ask nothing.
    """
    rows = list(open_rows(source, split)[0]())
    if limit is not None and limit < len(rows):
        rows = [rows[number * len(rows) // limit] for number in range(limit)]
    questions = []
    for where, row in rows:
        try:
            if isinstance(row, UserError):
                raise row
            question = question_of(*encode_whole(row, tokenizer), tokenizer.bos_token_id)
        except UserError as error:
            raise UserError(f"{source}, {where}: {error}") from error
        if question is None:
            raise UserError(
                f"{source}, {where}: the row has an answer but no question: give `messages`, or `prompt` and "
                "`completion`; the perplexity of plain text is --text"
            )
        questions.append(question)
    if not questions:
        raise UserError(f"data {source!r} has no rows")
    return questions


def text_of(tokens: Iterable[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Text of an answer, or of a reference, without special tokens."""
    return tokenizer.decode(list(tokens), skip_special_tokens=True)


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end an answer: EOS, what the generation config adds, and the chat template's end of a turn."""
    configured = model.generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    found = {tokenizer.eos_token_id, *configured, _end_of_turn(tokenizer)}
    return sorted(token for token in found if token is not None)


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that follows an answer in the chat template."""
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}]
    try:
        closing = render_chat(tokenizer, chat).rpartition(_MARK)[2]
    except UserError:
        raise
    except Exception:  # no template, or one that refuses; who needs it will say so
        return None
    first = tokenizer(closing, add_special_tokens=False)["input_ids"][:1]
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return first[0] if first and first[0] in special else None


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[Question],
    *,
    max_new_tokens: int | None = None,
    batch_size: int = 8,
    title: str = "answers",
) -> list[str]:
    """Greedy answers, one for each question and in their order.

    Args:
        questions: the longest are asked first, so what does not fit into memory shows at once.
        max_new_tokens: the most tokens of an answer; by default twice those of the longest reference, and 16 at least.
        batch_size: questions in one batch, padded on the left.
        title: what the progress bar is called.

    Raises:
        UserError: a question is longer than the model's context, or a batch does not fit into memory.
    """
    if max_new_tokens is None:
        max_new_tokens = max(16, 2 * max((len(question.reference) for question in questions), default=0))
    context = model.config.max_position_embeddings
    order = sorted(range(len(questions)), key=lambda number: -len(questions[number].prompt))
    if order and (longest := len(questions[order[0]].prompt)) >= context:
        raise UserError(
            f"question {order[0] + 1} has {longest} tokens, which leaves no room for an answer in the model's context "
            f"of {context}: leave such rows out"
        )
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    pad = 0 if pad is None else pad
    ends = stop_tokens(model, tokenizer)
    answers = [""] * len(questions)
    was_training = model.training
    model.eval()
    try:
        with counting_bar() as progress, torch.inference_mode():
            task = progress.add_task(title, total=len(questions))
            for first in range(0, len(order), batch_size):
                batch = order[first : first + batch_size]
                width = len(questions[batch[0]].prompt)
                inputs = torch.full((len(batch), width), pad)
                mask = torch.zeros_like(inputs)
                for row, number in enumerate(batch):
                    prompt = questions[number].prompt
                    inputs[row, width - len(prompt) :] = torch.tensor(prompt)
                    mask[row, width - len(prompt) :] = 1
                tokens = model.generate(
                    input_ids=inputs.to(model.device),
                    attention_mask=mask.to(model.device),
                    max_new_tokens=min(max_new_tokens, context - width),
                    do_sample=False,
                    num_beams=1,
                    use_cache=True,
                    eos_token_id=ends or None,
                    pad_token_id=pad,
                )
                for number, row in zip(batch, tokens[:, width:].tolist(), strict=True):
                    end = next((place for place, token in enumerate(row) if token in ends), len(row))
                    answers[number] = text_of(row[:end], tokenizer)
                progress.advance(task, len(batch))
    except torch.OutOfMemoryError as error:
        raise UserError(f"{batch_size} questions at once do not fit into memory: lower the batch size") from error
    finally:
        model.train(was_training)
    return answers
