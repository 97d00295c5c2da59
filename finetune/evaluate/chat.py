"""`deepseek-moe chat`: a conversation in the terminal, or with the lines of a pipe."""

import contextlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from ..errors import UserError
from ..files import write_text
from ..model.use import load_for_use
from ..runs.named import named
from .conversation import Conversation

COMMANDS = {
    "/new": "forget what was said",
    "/undo": "take back the last question and its answer",
    "/retry": "answer the last question again",
    "/save FILE": "write the conversation to a new file, as a row that fine-tuning reads",
    "/help": "show this",
    "/exit": "leave, as Ctrl-D does; Ctrl-C stops an answer",
}
# Where neither the command line nor the model's generation_config.json says otherwise.
_TEMPERATURE, _TOP_P = 0.6, 0.95


def chat(
    model: str | os.PathLike[str],
    *,
    adapter: str | os.PathLike[str] | None = None,
    system: str | None = None,
    max_new_tokens: int = 1024,
    temperature: float | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    greedy: bool = False,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    text_only: bool = False,
    device_map: str | None = None,
) -> None:
    """Talk with a model until Ctrl-D, `/exit` or the end of the pipe.

    Args:
        model: local folder or Hub name; of a run's folder the model or the adapter in it (`runs/named.py`).
        adapter: folder or Hub name of an adapter to put on the model.
        system: the system message.
        max_new_tokens: the most tokens of an answer.
        temperature, top_p: how answers are sampled; by default the model's own, else 0.6 and 0.95.
        seed: of the sampling's random numbers; None for another conversation each time.
        greedy: take the likeliest token instead.
        dtype: type of the weights in memory: auto (as stored), float32, bfloat16 or float16.
        trust_remote_code: run the tokenizer's code where it is code.
        text_only: of a model of several parts load the text part alone.
        device_map: where its parts go, as `device_map` of `from_pretrained`; None for one device (`model/use.py`).

    Raises:
        UserError: an argument, the model or the adapter cannot be used, or the tokenizer has no chat template.
    """
    sampling = _sampling(max_new_tokens, temperature, top_p, greedy)
    if seed is not None and not 0 <= seed < 2**63:
        raise UserError(f"--seed is {seed}: it is a whole number at least 0 and below 2**63")
    found = named(model, adapter)
    network, tokenizer = load_for_use(found.model, dtype, found.adapter, trust_remote_code, text_only, device_map)
    if not greedy:
        own = network.generation_config
        sampling["temperature"] = temperature or own.temperature or _TEMPERATURE
        sampling["top_p"] = top_p or own.top_p or _TOP_P
    conversation = Conversation(network, tokenizer, system, max_new_tokens, **sampling)
    if seed is not None:
        torch.manual_seed(seed)
    _Terminal(conversation).run(os.fspath(model))


def _sampling(max_new_tokens: int, temperature: float | None, top_p: float | None, greedy: bool) -> dict[str, Any]:
    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens is {max_new_tokens}: an answer has 1 at least")
    if greedy and (temperature is not None or top_p is not None):
        raise UserError("--greedy takes the likeliest token: leave --temperature and --top-p out")
    if temperature is not None and not 0 < temperature < math.inf:
        raise UserError(
            f"--temperature is {temperature}: it is above 0 and finite; for the likeliest token use --greedy"
        )
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"--top-p is {top_p}: it is a share above 0, and 1 at most")
    return {"do_sample": not greedy}


class _Terminal:
    """Reads lines, shows answers. What a pipe reads from it is the answers alone; all else goes to stderr."""

    def __init__(self, conversation: Conversation):
        self._conversation = conversation
        self._is_terminal = sys.stdin.isatty()
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)

    def run(self, name: str) -> None:
        if self._is_terminal:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (lets `input` edit lines and recall them)
            self._note(f"{name}: /help shows the commands, Ctrl-D leaves")
        for line in self._lines():
            if not line.strip():
                continue
            try:
                if line.startswith("/"):
                    if not self._obey(*line.split(maxsplit=1)):
                        return
                else:
                    self._answer(line)
            except UserError as error:
                self._console.print(Text(str(error), style="bold red"))
            except KeyboardInterrupt:
                if not self._is_terminal:
                    raise
                self._note("\nstopped: neither question nor answer is kept")

    def _lines(self) -> Iterator[str]:
        while True:
            try:
                line = input("> ") if self._is_terminal else sys.stdin.readline()
            except EOFError:
                self._note("")
                return
            except KeyboardInterrupt:
                if not self._is_terminal:
                    raise
                self._note("\nCtrl-D leaves")
                continue
            if not self._is_terminal and not line:
                return
            yield line.rstrip("\r\n")

    def _obey(self, command: str, argument: str = "") -> bool:
        """Whether the conversation goes on."""
        conversation = self._conversation
        if command == "/exit":
            return False
        if command == "/new":
            conversation.clear()
            self._note("a new conversation")
        elif command in ("/undo", "/retry"):
            question = conversation.undo()
            if question is None:
                raise UserError(f"{command}: nothing was asked yet")
            if command == "/undo":
                self._note(f"took back: {question}")
            else:
                self._answer(question)
        elif command == "/save":
            self._save(argument)
        elif command == "/help":
            self._note("\n".join(f"{name:12}{meaning}" for name, meaning in COMMANDS.items()))
        else:
            raise UserError(f"{command} is not a command: {', '.join(COMMANDS)}")
        return True

    def _answer(self, question: str) -> None:
        conversation, started = self._conversation, time.monotonic()
        with _interrupts() as stopped:
            conversation.ask(question, show=self._show, stopped=stopped)
            was_stopped = stopped()
        self._show("\n")
        if self._is_terminal:
            speed = conversation.new_tokens / (time.monotonic() - started)
            used = conversation.prompt_tokens + conversation.new_tokens
            self._note(
                f"{'stopped; ' * was_stopped}{conversation.new_tokens} tokens, {speed:.1f} a second; "
                f"{used:,} of {conversation.context:,} used"
            )

    def _save(self, name: str) -> None:
        path = Path(name.strip()).expanduser()
        if not name.strip():
            raise UserError("/save needs the name of a file")
        if path.exists():
            raise UserError(f"{path} exists: name another file")
        if not any(message["role"] == "assistant" for message in self._conversation.messages):
            raise UserError("/save: nothing was said yet")
        row = {"messages": self._conversation.messages}
        try:
            write_text(path, json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error
        self._note(f"saved to {path}")

    def _show(self, piece: str) -> None:
        print(piece, end="", flush=True)

    def _note(self, text: str) -> None:
        self._console.print(Text(text, style="dim"))


@contextlib.contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed in the block, which goes on; pressed again it stops the program as ever.

    An exception in the midst of a layer would leave a cache in which some layers have read more than others.
    """
    pressed = []

    def press(number: int, frame: Any) -> None:
        if pressed:
            signal.default_int_handler(number, frame)
        pressed.append(number)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)
