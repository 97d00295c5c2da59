"""What a row says, checked and in one form: messages whose content is text, their tool calls, and tools.

Arrow gives every row of a data set the keys that any row has, and null for those it lacks, inside tool calls and the
schemas of tools as well; so a null is no value. One that is meant can be written in JSON text: `arguments` and `tools`
may be text, whose nulls stay.
"""

import json
import re
from typing import Any

from .report import RowError

# Noncharacters, which Unicode keeps for such use inside a program. No row has one (`checked_object`).
REAL, BROKEN, MARK = "\ufdd0", "\ufdd1", "\ufdd2"
_NO_TEXT = re.compile("[\ud800-\udfff\ufdd0-\ufdef]")
DEEPEST = 100  # lists and objects within each other
MALFORMED = "malformed messages"
_KINDS = {str: "text", bool: "a truth value", int: "a number", float: "a number", list: "a list", dict: "an object"}


def checked_object(row: Any) -> dict[str, Any]:
    """The row without its nulls; a RowError if it is no JSON object, too deep, or holds what is no text."""
    _check_texts(row, "", 0)
    if not isinstance(row, dict):
        raise RowError(f"a row is a JSON object, not {shown(row)}", "no JSON object")
    return without_nulls(row)


def checked_messages(messages: Any, name: str = "messages") -> list[dict[str, Any]]:
    """The messages without nulls, with `content` as text; None only where a message calls a tool and says nothing.

    Raises:
        RowError: they are no list of messages with roles, a content is no text, or a tool call has no function.
    """
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages
    ):
        raise RowError(f'`{name}` is a list of {{"role": ..., "content": ...}}', MALFORMED)
    if not messages:
        raise RowError(f"`{name}` is empty", "empty")
    return [_checked_message(without_nulls(message)) for message in messages]


def checked_tools(tools: Any) -> list[dict[str, Any]] | None:
    """The row's `tools`, which may be JSON text, whole or each; None if there are none."""
    tools = read_json(tools, "tools")
    if not tools:
        return None
    tools = [read_json(tool, "tools") for tool in tools] if isinstance(tools, list) else [tools]
    for tool in tools:
        if not isinstance(tool, dict):
            raise RowError(f"`tools` is a list of objects; {shown(tool)} is none", "malformed tools")
    return tools


def read_json(value: Any, name: str) -> Any:
    """What JSON text says; any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        found = parse_json(value)
    except RowError as error:
        raise RowError(f"`{name}`: {error}", error.reason) from None
    except ValueError as error:
        raise RowError(f"`{name}` is text but not JSON ({error}): {shown(value)}", f"`{name}` is not JSON") from error
    _check_texts(found, name, 0)
    return found


def parse_json(text: str | bytes) -> Any:
    """What JSON says.

    Raises:
        ValueError: it is not JSON.
        RowError: it has a key twice, or is too deep to be read.
    """
    try:
        return json.loads(text, **JSON_OPTIONS)
    except RecursionError:
        raise too_deep() from None


def too_deep() -> RowError:
    """The error of a row that has more lists and objects within each other than are read."""
    return RowError(f"lists and objects are nested more than {DEEPEST} deep", "nested too deeply")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise RowError(
            f"the key {ascii(twice[:60])} is there twice: leave one of them out", "a key that is there twice"
        )
    return made


JSON_OPTIONS = {"object_pairs_hook": _once}


def without_nulls(value: Any) -> Any:
    """The value without the keys whose value is None, at every depth."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def kind(value: Any) -> str:
    return _KINDS.get(type(value), f"a {type(value).__name__}")


def shown(value: Any) -> str:
    """The beginning of a value, for an error."""
    return json.dumps(value, ensure_ascii=False, default=str)[:60]


def _check_texts(value: Any, key: str, depth: int) -> None:
    if depth > DEEPEST:
        raise too_deep()
    if isinstance(value, str) and (found := _NO_TEXT.search(value)):
        where = f"{key[:60]!r} has " if key else "there is "
        code = ord(found[0])
        if 0xDC80 <= code <= 0xDCFF:  # also what Python makes of a byte that is no UTF-8
            what = f"half a character (U+{code:04X}, or the byte 0x{code - 0xDC00:02X}, which is not UTF-8)"
        else:
            what = f"half a character (U+{code:04X})" if code < 0xE000 else f"U+{code:04X}, which Unicode keeps out"
        raise RowError(f"{where}{what}: it is no text", "no text in Unicode")
    if isinstance(value, dict):
        for name, item in value.items():
            _check_texts(name, "", depth)
            _check_texts(item, key or str(name), depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check_texts(item, key, depth + 1)


def keys_of(row: dict[str, Any]) -> str:
    """The keys of a row, for an error."""
    return ", ".join(key if key.isprintable() else ascii(key) for key in row)[:200] or "none"


def _checked_message(message: dict[str, Any]) -> dict[str, Any]:
    if "tool_calls" in message:
        calls = _checked_calls(message.pop("tool_calls"))
        message |= {"tool_calls": calls} if calls else {}
    content = message.get("content")
    if isinstance(content, list):
        content = _joined(content)
    if content is None and not (message.get("tool_calls") or message.get("function_call")):
        raise RowError(f"a message of the role {message['role']!r} has no `content`", "empty")
    if not isinstance(content, str | None):
        raise RowError(
            f"`content` of a message is text, or a list of parts of the type 'text'; here it is {kind(content)}: "
            f"{shown(content)}",
            "content that is no text",
        )
    return {**message, "content": content}


def _joined(parts: list[Any]) -> str:
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            found = f"of the type {part['type']!r}" if isinstance(part, dict) and "type" in part else kind(part)
            found = "without `text`" if isinstance(part, dict) and part.get("type") == "text" else found
            raise RowError(
                f"`content` of a message has a part {found}; only parts of the type 'text' can be learned",
                "content that is no text",
            )
    return "".join(part["text"] for part in parts)


def _checked_calls(calls: Any) -> list[dict[str, Any]]:
    calls = read_json(calls, "tool_calls")
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise RowError(f"`tool_calls` is a list of objects, not {shown(calls)}", MALFORMED)
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            wanted = '{"function": {"name": ..., "arguments": ...}}'
            raise RowError(f"a tool call is {wanted}, not {shown(call)}", MALFORMED)
        if not isinstance(function.get("arguments", {}), dict | str):
            found = f"{kind(function['arguments'])}: {shown(function['arguments'])}"
            raise RowError(f"`arguments` of a tool call is an object, or JSON text, not {found}", MALFORMED)
    return calls
