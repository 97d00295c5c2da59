"""A row as pieces of text, learned or not, and their token ids and labels (`rows.py` says which rows there are)."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from .messages import MALFORMED, checked_messages, checked_object, checked_tools, shown
from .report import CUT_AWAY, TOO_LONG, RowError
from .templates import THOUGHTS, ChatTemplate

IGNORED = -100
_MARK = "\ue000"  # a character of Unicode's private use area: in no text


def encode(row: Any, tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[list[int], list[int]]:
    """Token ids and labels of one row, at most `max_length` of each.

    Raises:
        RowError: nothing can be learned from the row, or the chat template refuses it.
    """
    ids, labels = encode_whole(row, tokenizer)
    return ids[:max_length], labels[:max_length]


def encode_whole(row: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids and labels of one row, however long; errors are those of `encode`."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids, labels, last = [], [], None
    for text, learned in _pieces(row, tokenizer):
        piece = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids += piece
        labels += piece if learned else [IGNORED] * len(piece)
        last = (learned, piece) if piece else last
    if bos is not None and (ids[:1] == [bos] or row.get("messages") is None):
        start = next((i for i, token in enumerate(ids) if token != bos), len(ids))
        ids, labels = [bos, *ids[start:]], [IGNORED, *labels[start:]]
    if eos is not None and last and last[0] and eos not in last[1]:
        ids, labels = [*ids, eos], [*labels, eos]
    return ids, labels


def encode_fitting(
    row: Any, tokenizer: PreTrainedTokenizerBase, max_length: int, long_rows: str
) -> tuple[list[dict[str, list[int]]], str | None]:
    """A row's `input_ids` and `labels`, none longer than `max_length`, and "cut" or "split" if it had to be.

    Split, a `text` row goes on in further ones; each begins with the last token of the one before, so that every token
    is learned once. Rows of other kinds are cut.

    Raises:
        RowError: nothing can be learned from the row; with `long_rows` "skip" or "stop", also that it is too long.
    """
    ids, labels = encode_whole(row, tokenizer)
    made = None
    if len(ids) <= max_length:
        parts = [(ids, labels)]
    elif long_rows in ("skip", "stop"):
        raise too_long(len(ids), max_length)
    elif long_rows == "split" and row.get("messages") is None and row.get("completion") is None:
        starts, made = range(0, len(ids) - 1, max_length - 1), "split"
        parts = [(ids[i : i + max_length], labels[i : i + max_length]) for i in starts]
    else:
        parts, made = [(ids[:max_length], labels[:max_length])], "cut"
    # What stands first has nothing to be predicted from.
    parts = [{"input_ids": ids, "labels": [IGNORED, *labels[1:]]} for ids, labels in parts]
    parts = [part for part in parts if any(label != IGNORED for label in part["labels"])]
    if not parts and made:
        raise cut_away(max_length)
    if not parts:
        raise RowError("nothing in the row is learned", "nothing to learn")
    return parts, made


def too_long(length: int, max_length: int) -> RowError:
    """The error of a row of `length` tokens."""
    return RowError(f"the row has {length} tokens, more than max_length={max_length}", TOO_LONG)


def cut_away(max_length: int) -> RowError:
    """The error of a row of which the cut leaves nothing to learn."""
    return RowError(f"cut to max_length={max_length}, the row has nothing left to learn", CUT_AWAY)


def _pieces(row: Any, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """The row's text in order, each piece with whether it is learned."""
    row = checked_object(row)
    if "messages" in row:
        return _chat_pieces(checked_messages(row["messages"]), row.get("tools"), tokenizer)
    wanted = ("prompt", "completion") if "prompt" in row or "completion" in row else ("text",)
    for key in wanted:
        if not isinstance(row.get(key), str):
            found = f"{key!r} is {shown(row[key])}" if key in row else f"this one has {', '.join(row) or 'none'}"
            raise RowError(
                f"a row has `messages`, `prompt` and `completion`, or `text`, as text; {found}", "of no known kind"
            )
    if not row[wanted[-1]].strip():
        raise RowError(f"`{wanted[-1]}` is empty", "empty")
    return [(row[key], key != "prompt") for key in wanted]


def _chat_pieces(
    messages: list[dict[str, Any]], tools: Any, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, bool]]:
    turns = _learned_turns(messages)
    messages = [{key: value for key, value in m.items() if key not in ("mask", "weight")} for m in messages]
    template = ChatTemplate(tokenizer, checked_tools(tools))
    messages, render = template.fitted(messages, turns), template.render

    def opening(turn: int) -> tuple[str | None, str]:
        """What a transcript has before and after what a turn says; None if it does not show that."""
        said = {"content", *(messages[turn].keys() & THOUGHTS)}
        before, mark, after = render(
            [*messages[:turn], {**messages[turn], **dict.fromkeys(said, _MARK)}],
        ).partition(_MARK)
        return (before if mark else None), after

    whole, pieces, done = render(messages), [], 0
    for role in {message["role"] for message in messages} - {"system", "user", "assistant"}:
        i = next(i for i, message in enumerate(messages) if message["role"] == role)
        if len(messages) > 1 and render(messages[:i] + messages[i + 1 :]) == whole:
            raise RowError(f"the chat template ignores messages of the role {role!r}", "unknown role")
    for turn in turns:
        through, prompt = render(messages[: turn + 1]), render(messages[:turn], prompt=True)
        start = len(prompt)
        if _is_dropped(messages[turn], through):
            # A thought, which the template writes into no transcript: learn it as it is generated.
            before, after = opening(turn)
            thinks = any(key in messages[turn] for key in THOUGHTS)
            if turn + 1 < len(messages) or thinks or before is None or not prompt.startswith(before):
                raise RowError(
                    "the chat template leaves a part of an answer (a thought?) out, so it cannot be learned as it is "
                    "generated: use one answer a row and let it come last, or give that message `mask: 1`",
                    "answer rewritten by the template",
                )
            content, opened = messages[turn]["content"], prompt[len(before) :]
            if opened.strip() and content.lstrip().startswith(opened.strip()):
                content = content.lstrip().removeprefix(opened.rstrip()).removeprefix(opened[len(opened.rstrip()) :])
            return [*pieces, (prompt[done:], False), (content + after, True)]
        if not through.startswith(prompt):
            # The template opens an answer otherwise for generation than in a transcript (`<think>`): learn from where
            # the transcript has the content.
            before, _ = opening(turn)
            if before is None or not through.startswith(before):
                raise RowError(
                    "the chat template does not show where an answer begins: use `prompt` and `completion`",
                    "answer rewritten by the template",
                )
            start = len(before)
        if not through.startswith(render(messages[:turn])) or not whole.startswith(through):
            raise RowError(
                "the chat template rewrites earlier turns, so they cannot be learned as they are generated: "
                "use one answer a row, or `prompt` and `completion`",
                "answer rewritten by the template",
            )
        pieces += [(whole[done:start], False), (whole[start : len(through)], True)]
        done = len(through)
    return [*pieces, (whole[done:], False)]


def _learned_turns(messages: list[dict[str, Any]]) -> list[int]:
    """Indices of the assistant's turns without `mask: 1` (ESFT's data) and `weight: 0`."""
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise RowError("`messages` has no turn with the role 'assistant' to learn from", "no answer")
    for key in ("mask", "weight"):
        for message in messages:
            if message.get(key, 0) not in (0, 1):
                raise RowError(f"`{key}` of a message is 0 or 1, not {shown(message[key])}", MALFORMED)
    turns = [i for i in answers if not messages[i].get("mask", 0) and messages[i].get("weight", 1)]
    if not turns:
        raise RowError("every answer has `mask: 1` or `weight: 0`", "nothing to learn")
    for i in turns:
        if not messages[i].get("tool_calls") and not (messages[i]["content"] or "").strip():
            raise RowError("an answer is empty", "empty")
    return turns


def _is_dropped(message: dict[str, Any], transcript: str) -> bool:
    return not message.get("tool_calls") and (message["content"] or "").strip() not in transcript
