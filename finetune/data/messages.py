"""What a row says, checked and in one form: messages whose content is text, their tool calls, and tools.

Arrow gives every row of a data set the keys that any row has, and null for those it lacks, inside tool calls and the
schemas of tools as well; so a null is no value. One that is meant can be written in JSON text: `arguments` and `tools`
may be text, whose nulls stay.
"""

import json
from typing import Any

from .report import RowError

MALFORMED = "malformed messages"
_KINDS = {str: "text", bool: "a truth value", int: "a number", float: "a number", list: "a list", dict: "an object"}


def checked_object(row: Any) -> dict[str, Any]:
    """The row without its nulls; a RowError if it is no JSON object."""
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
        return json.loads(value)
    except ValueError as error:
        raise RowError(f"`{name}` is text but not JSON ({error}): {shown(value)}", f"`{name}` is not JSON") from error


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
