"""Which kind a row is, and rows of other data sets as one of ours.

    {"instruction": ..., "input": ..., "output": ...}                  Alpaca; also `system` and `history` of pairs
    {"conversations": [{"from": "human", "value": ...}, ...]}          ShareGPT; also `system`; `role`, `content`
    {"conversations": [...], "chosen": {"from": "gpt", "value": ...}, "rejected": {...}}     as a row of preferences
    {"instruction": ..., "input": ..., "chosen": ..., "rejected": ...}                       and Alpaca's

All become messages. What comes first counts where a row is of several kinds: `messages`, `conversations`, `prompt` and
`completion`, Alpaca, `text`; Alpaca's own rows have a `text`, too.
"""

from typing import Any

from .messages import MALFORMED, read_json, shown
from .report import RowError

KINDS = "`messages`, `prompt` and `completion`, or `text`"
_PREFERENCES = ("chosen", "rejected")
_ALPACA, _SHAREGPT = "Alpaca instructions", "ShareGPT conversations"
_SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "function_call": "assistant",
}


def known_form(row: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """A row as one of the kinds that are learned from, and what it was, in words.

    Args:
        row: without nulls. One of no known kind stays as it is.

    Raises:
        RowError: it has the keys of a kind, but not what belongs there.
    """
    if "messages" in row:
        if _has_speakers(row["messages"]):
            return {**row, "messages": _talk(row["messages"])}, _SHAREGPT
        return row, "messages with content in parts" if _has_parts(row["messages"]) else "messages"
    if "conversations" in row:
        return _from_sharegpt(row), _SHAREGPT
    is_alpaca = "instruction" in row and not ("prompt" in row and "completion" in row)
    if is_alpaca and ("output" in row or all(side in row for side in _PREFERENCES)):
        return _from_alpaca(row), _ALPACA
    if any(side in row for side in _PREFERENCES):
        return row, "preferences"
    if is_text(row):
        return row, "text" if "text" in row else "no known kind"
    return row, "prompt and completion"


def is_text(row: dict[str, Any]) -> bool:
    """Whether a row is no messages and no prompt, so that only its `text` is left."""
    return not any(key in row for key in ("messages", "prompt", "completion"))


def _from_sharegpt(row: dict[str, Any]) -> dict[str, Any]:
    talk = row["conversations"]
    talk = _talk(talk) if _has_speakers(talk) else talk
    if isinstance(row.get("system"), str) and isinstance(talk, list) and row["system"].strip():
        talk = [{"role": "system", "content": row["system"]}, *talk]
    made = {"tools": row["tools"]} if "tools" in row else {}
    sides = {side: row[side] for side in _PREFERENCES if side in row}
    if not sides:
        return {**made, "messages": talk}
    for side, answer in sides.items():
        answer = [answer] if isinstance(answer, dict) else answer
        sides[side] = _talk(answer) if _has_speakers(answer) else answer
    return {**made, "prompt": talk, **sides}


def _from_alpaca(row: dict[str, Any]) -> dict[str, Any]:
    for key in ("instruction", "input", "output", "system"):
        if not isinstance(row.get(key, ""), str):
            raise RowError(f"`{key}` of an Alpaca row is text, not {shown(row[key])}", "of no known kind")
    history = row.get("history", [])
    if not isinstance(history, list) or not all(_is_pair(turn) for turn in history):
        raise RowError(
            f"`history` of an Alpaca row is a list of pairs of question and answer, not {shown(history)}", MALFORMED
        )
    question = "\n\n".join(text for text in (row["instruction"], row.get("input", "")) if text.strip())
    if not question:
        raise RowError("`instruction` is empty", "empty")
    talk = [{"role": "system", "content": row["system"]}] if row.get("system", "").strip() else []
    for asked, answered in history:
        talk += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    talk.append({"role": "user", "content": question})
    if "output" in row:
        return {"messages": [*talk, {"role": "assistant", "content": row["output"]}]}
    return {"prompt": talk, **{side: row[side] for side in _PREFERENCES}}


def _is_pair(turn: Any) -> bool:
    return isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)


def _has_speakers(talk: Any) -> bool:
    return isinstance(talk, list) and any(
        isinstance(turn, dict) and "from" in turn and "role" not in turn for turn in talk
    )


def _has_parts(talk: Any) -> bool:
    return isinstance(talk, list) and any(
        isinstance(turn, dict) and isinstance(turn.get("content"), list) for turn in talk
    )


def _talk(turns: list[Any]) -> list[dict[str, Any]]:
    """Messages of turns with `from` and `value`."""
    messages = []
    for turn in turns:
        if not isinstance(turn, dict) or "from" not in turn:
            raise RowError(
                f'`conversations` is a list of {{"from": ..., "value": ...}}; {shown(turn)} is not', MALFORMED
            )
        speaker, value = turn["from"], turn.get("value")
        role = _SPEAKERS.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            raise RowError(f"`from` is {shown(speaker)}: it is one of {', '.join(_SPEAKERS)}", "unknown role")
        if value is None:
            raise RowError(f"a turn of {speaker!r} has no `value`", "empty")
        message = {key: item for key, item in turn.items() if key not in ("from", "value")}
        if speaker == "function_call":
            calls = read_json(value, "value")
            calls = [calls] if isinstance(calls, dict) else calls
            messages.append({**message, "role": role, "content": "", "tool_calls": calls})
        else:
            messages.append({**message, "role": role, "content": value})
    return messages
