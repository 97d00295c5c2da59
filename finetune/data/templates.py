"""A chat template, and whether it shows what a row says: what it leaves out would be lost without a word."""

import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging
from transformers.utils.chat_template_utils import render_jinja_template

from ..errors import UserError, first_line
from .messages import MARK, read_json
from .report import RowError
from .time_limit import TimeLimit, time_limit

logger = logging.get_logger(__name__)
_Message = dict[str, Any]
_REFUSED = "refused by the template"
_SECONDS = 10  # of computing, for one text

# Keys that hold an answer's thought, by different sources of data.
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_WAYS_OUT = {
    "tools": "describe them in the system message, as the model's documentation does",
    "tool_calls": "write the call into `content`, as the model's documentation does",
    "arguments": "write the call into `content`, as the model's documentation does",
    "content": "give it a message of its own",
    "function_call": "write it as `tool_calls`, or into `content`",
    **dict.fromkeys(THOUGHTS, "put it into `content`, between the marks that the model knows (`<think>`)"),
}


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[_Message],
    tools: list[dict[str, Any]] | None = None,
    prompt: bool = False,
) -> str:
    """The text that a tokenizer's chat template makes of messages, with `prompt` that in front of the next answer too.

    What the template raises is passed on: it is a program of its own and can fail in any way.

    Raises:
        UserError: it does not come to an end, or computes what may not.
    """
    name = f"the chat template of {tokenizer.name_or_path!r}"
    template = tokenizer.get_chat_template(None, tools)
    if _has_powers(template):
        raise UserError(f"{name} computes a power (`**`), which can take for ever and no template needs: change it")
    try:
        with time_limit(_SECONDS):
            if any(message.get("content", "") is None for message in messages):
                # `apply_chat_template` would take the key away, of whose null DeepSeek's templates make a tool call.
                return render_jinja_template(
                    [messages],
                    tools=tools,
                    chat_template=template,
                    add_generation_prompt=prompt,
                    **tokenizer.special_tokens_map,
                )[0][0]
            return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt)
    except TimeLimit as error:
        raise UserError(f"{name} is refused: {error}; take the template of a model that you trust") from error


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a UserError if the chat template cannot render a question."""
    try:
        render_chat(tokenizer, [{"role": "user", "content": "?"}], prompt=True)
    except UserError:
        raise
    except Exception as error:  # see above
        raise UserError(f"the chat template refuses a question: {first_line(error)}") from error


@functools.lru_cache
def _has_powers(template: str) -> bool:
    # Python computes them at once, also while the template is compiled, and no timer interrupts that.
    try:
        return any(token[1:] == ("operator", "**") for token in jinja2.Environment().lex(template))
    except jinja2.TemplateSyntaxError:  # which the rendering then says
        return False


class ChatTemplate:
    """A tokenizer's chat template with the tools of one row."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tools: list[dict[str, Any]] | None = None):
        self.tokenizer, self.tools = tokenizer, tools

    def render(self, messages: list[_Message], prompt: bool = False, with_tools: bool = True) -> str:
        """The text of the messages, with `prompt` that in front of the next answer too; empty for none.

        Raises:
            RowError: the template refuses them.
        """
        if not messages:
            return ""
        try:
            return render_chat(self.tokenizer, messages, self.tools if with_tools else None, prompt)
        except UserError:
            raise
        except Exception as error:  # a template is a program of its own and can fail in any way
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RowError(f"the chat template refuses `messages`: {reason}", _REFUSED) from error

    def fitted(self, messages: list[_Message], learned: list[int]) -> list[_Message]:
        """The messages in the form that this template shows whole.

        Templates differ in how they take tool calls: some show them only where `content` is null, some want their
        arguments as text and others as objects.

        Args:
            learned: indices of the answers that are learned; whether others keep their thoughts is up to the template.

        Raises:
            RowError: the template does not show the tools, a tool call, its arguments, or a learned answer's thought.
        """
        messages = list(messages)
        for i, message in enumerate(messages):
            if message.get("tool_calls"):
                messages[i] = self._with_calls(messages[:i], message)
        for i, message in enumerate(messages):
            if message.get("function_call") and not self._shows(messages[:i], message, "function_call"):
                raise _lost("function_call")
            thought = next((key for key in THOUGHTS if message.get(key)), None)
            if thought and i in learned and not self._shows(messages[:i], message, *THOUGHTS):
                raise _lost(thought)
        if self.tools and self.render(messages) == _try(lambda: self.render(messages, with_tools=False)):
            raise _lost("tools")
        return messages

    def _with_calls(self, before: list[_Message], message: _Message) -> _Message:
        """The message so that its tool calls are shown, with what it says, in the row's own form if that will do."""
        problems = []
        for said in self._contents(message):
            for calls in _forms(message["tool_calls"]):
                made = {**said, "tool_calls": calls}
                try:
                    self._check_calls(before, made)
                except RowError as error:
                    problems.append(error)
                    continue
                if message["content"] is not None and said.get("content", "") is None:
                    logger.warning_once(
                        "tool calls with an empty `content` are read with null instead: else the chat template would "
                        "not show them"
                    )
                return made
        # What came nearest to being shown says best what is wrong.
        raise max(problems, key=lambda error: (error.reason != _REFUSED, error.reason == _reason("arguments")))

    def _contents(self, message: _Message) -> Iterator[_Message]:
        """The message, and where it says nothing, with the other forms of that: no `content`, null, and no text."""
        content = message["content"]
        if content is None:  # as transformers has it
            yield {key: value for key, value in message.items() if key != "content"}
        else:
            yield message
        own = type(self.tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template
        if not (content or "").strip() and not own:
            yield {**message, "content": None}
        if content is None:
            yield {**message, "content": ""}

    def _check_calls(self, before: list[_Message], message: _Message) -> None:
        if not self._shows(before, message, "tool_calls"):
            raise _lost("tool_calls", " of a message that has `content`, too" if message.get("content") else "")
        if message.get("content", "") is None:
            as_text = _try(lambda: self.render([*before, {**message, "content": str(None)}]))
            if self.render([*before, message]) == as_text:
                raise RowError("the chat template writes a `content` of null as text", _REFUSED)
        if message.get("content") and MARK not in self.render([*before, {**message, "content": MARK}]):
            raise _lost("content", " of a message that has `tool_calls`, too")
        probed, probes = _probed(message["tool_calls"])
        if not probes:
            return
        text = self.render([*before, {**message, "tool_calls": probed}])
        for name, wrong in probes.items():
            if name not in text or wrong in text:
                raise _lost("arguments", " of a tool call")

    def _shows(self, before: list[_Message], message: _Message, *keys: str) -> bool:
        """Whether a transcript that ends with the message would be another without these keys of it."""
        bare = {name: value for name, value in message.items() if name not in keys}
        return self.render([*before, message]) != _try(lambda: self.render([*before, bare]))


def _lost(key: str, where: str = "") -> RowError:
    return RowError(
        f"the chat template does not show `{key}`{where}, which would be lost: {_WAYS_OUT[key]}, leave it out, or use "
        "another chat template",
        _reason(key),
    )


def _reason(key: str) -> str:
    return f"`{key}` not shown by the template"


def _forms(calls: list[_Message]) -> Iterator[list[_Message]]:
    """The calls as they are, with all arguments as text, with all of them as objects."""
    yield calls
    for other in (_as_text, _as_object):
        made = [_with_arguments(call, other) for call in calls]
        if made != calls:
            yield made


def _as_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _as_object(arguments: Any) -> Any:
    try:
        found = read_json(arguments, "arguments")
    except RowError:  # text that a model said; only a template that takes text can show it
        return arguments
    return found if isinstance(found, dict) else arguments


def _with_arguments(call: _Message, change: Callable[[Any], Any]) -> _Message:
    if "function" in call:
        return {**call, "function": _with_arguments(call["function"], change)}
    return {**call, "arguments": change(call["arguments"])} if "arguments" in call else call


def _probed(calls: list[_Message]) -> tuple[list[_Message], dict[str, str]]:
    """The calls with a word of ours in place of their arguments, where they have any.

    And those words, each with what it looks like where the form was not what the template takes: an object that was
    written as Python writes it, or a text that was quoted once more.
    """
    probes: dict[str, str] = {}

    def probe(arguments: Any) -> Any:
        if _as_object(arguments) in ({}, ""):
            return arguments
        word = f"probe{len(probes)}x"
        if isinstance(arguments, str):
            text = json.dumps({word: word})
            probes[word] = json.dumps(text)
            return text
        probes[word] = str({word: word})
        return {word: word}

    return [_with_arguments(call, probe) for call in calls], probes


def _try(render: Callable[[], str]) -> str | None:
    try:
        return render()
    except RowError:
        return None
