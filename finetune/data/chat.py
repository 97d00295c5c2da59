"""A row as pieces of text, learned or not, and their token ids and labels (`rows.py` says which rows there are)."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from .forms import KINDS, is_text, known_form
from .messages import BROKEN, MALFORMED, MARK, checked_messages, checked_object, checked_tools, keys_of, shown
from .report import CUT_AWAY, TOO_LONG, RowError
from .templates import THOUGHTS, ChatTemplate
from .words import Words, words_of

IGNORED = -100


def encode(
    row: Any, tokenizer: PreTrainedTokenizerBase, max_length: int, split_special_tokens: bool = True
) -> tuple[list[int], list[int]]:
    """Token ids and labels of one row, at most `max_length` of each.

    Args:
        split_special_tokens: control tokens in what the row says are text (`words.py`).

    Raises:
        RowError: nothing can be learned from the row, or the chat template refuses it.
    """
    ids, labels, _ = first_tokens(row, words_of(tokenizer, split_special_tokens), max_length)
    return ids[:max_length], labels[:max_length]


def encode_whole(
    row: Any, tokenizer: PreTrainedTokenizerBase, split_special_tokens: bool = True
) -> tuple[list[int], list[int]]:
    """Token ids and labels of one row, however long; errors are those of `encode`."""
    ids, labels, _ = first_tokens(row, words_of(tokenizer, split_special_tokens), None)
    return ids, labels


def first_tokens(row: Any, words: Words, max_length: int | None) -> tuple[list[int], list[int], bool]:
    """Token ids and labels of a row, and whether these are all: of one longer than `max_length` more than so many."""
    row, _ = known_form(checked_object(row))
    pieces = _pieces(row, words)
    words.rows_as_text += any(BROKEN in text for text, _ in pieces)
    tokenizer, by_template = words.tokenizer, "messages" in row
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids, labels, last, whole = [], [], None, True
    for text, learned in pieces:
        room = None if max_length is None else max_length + 1 - len(ids)
        if room is not None and room <= 0:
            whole = False
            break
        piece, is_all = words.ids(text, room)
        ids += piece
        labels += piece if learned else [IGNORED] * len(piece)
        last = (learned, piece) if piece else last
        whole = whole and is_all
    if bos is not None and (ids[:1] == [bos] or not by_template):
        start = next((i for i, token in enumerate(ids) if token != bos), len(ids))
        if not whole and len(ids) - start < max_length:  # BOS again and again
            return first_tokens(row, words, None)
        ids, labels = [bos, *ids[start:]], [IGNORED, *labels[start:]]
    if whole and eos is not None and last and last[0] and not _ends(last[1], tokenizer, by_template and words.splits):
        ids, labels = [*ids, eos], [*labels, eos]
    return ids, labels, whole


def _ends(ids: list[int], tokenizer: PreTrainedTokenizerBase, by_template: bool) -> bool:
    """Whether an answer has EOS at its end: one that the template wrote, or one behind which nothing stands."""
    eos = tokenizer.eos_token_id
    if eos not in ids or by_template:
        return eos in ids
    behind = ids[len(ids) - ids[::-1].index(eos) :]
    return not tokenizer.decode(behind).strip()


def encode_fitting(
    row: Any, tokenizer: PreTrainedTokenizerBase, max_length: int, long_rows: str, split_special_tokens: bool = True
) -> tuple[list[dict[str, list[int]]], str | None]:
    """A row's `input_ids` and `labels`, none longer than `max_length`, and "cut" or "split" if it had to be.

    Split, a `text` row goes on in further ones; each begins with the last token of the one before, so that every token
    is learned once. Rows of other kinds are cut.

    Raises:
        RowError: nothing can be learned from the row; with `long_rows` "skip" or "stop", also that it is too long.
    """
    splits = long_rows == "split" and is_text(row)
    words = words_of(tokenizer, split_special_tokens)
    ids, labels, whole = first_tokens(row, words, None if splits else max_length)
    made = None
    if len(ids) <= max_length and whole:
        parts = [(ids, labels)]
    elif long_rows in ("skip", "stop"):
        raise too_long(max_length)
    elif splits:
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


def too_long(max_length: int) -> RowError:
    """The error of a row that is longer."""
    return RowError(f"the row has more tokens than max_length={max_length}", TOO_LONG)


def cut_away(max_length: int) -> RowError:
    """The error of a row of which the cut leaves nothing to learn."""
    return RowError(f"cut to max_length={max_length}, the row has nothing left to learn", CUT_AWAY)


def _pieces(row: dict[str, Any], words: Words) -> list[tuple[str, bool]]:
    """The row's text in order, each piece with whether it is learned; control tokens in it as `words` has them."""
    if "messages" in row:
        messages = words.escaped_messages(checked_messages(row["messages"]))
        template = ChatTemplate(words.tokenizer, words.escaped_tools(checked_tools(row.get("tools"))))
        return _chat_pieces(messages, template)
    wanted = ("text",) if is_text(row) else ("prompt", "completion")
    for key in wanted:
        if not isinstance(row.get(key), str):
            found = f"{key!r} is {shown(row[key])}" if key in row else f"this one has {keys_of(row)}"
            raise RowError(f"a row has {KINDS}, as text; {found}", "of no known kind")
    if not row[wanted[-1]].strip():
        raise RowError(f"`{wanted[-1]}` is empty", "empty")
    return [(words.escaped_text(row[key]), key != "prompt") for key in wanted]


def _chat_pieces(messages: list[dict[str, Any]], template: ChatTemplate) -> list[tuple[str, bool]]:
    turns = _learned_turns(messages)
    messages = [{key: value for key, value in m.items() if key not in ("mask", "weight")} for m in messages]
    messages, render = template.fitted(messages, turns), template.render

    def opening(turn: int) -> tuple[str | None, str]:
        """What a transcript has before and after what a turn says; None if it does not show that."""
        said = {"content", *(messages[turn].keys() & THOUGHTS)}
        before, mark, after = render(
            [*messages[:turn], {**messages[turn], **dict.fromkeys(said, MARK)}],
        ).partition(MARK)
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
