"""Text of rows to token ids: control tokens in it as text, and no more of a long text than is wanted.

A control token is one that says where a turn or a text begins and ends. In a text that somebody wrote it is a string
like any other: were it read as the token, a row could close its turn and open another. What it is:

    special tokens of the tokenizer (`special: true`), as transformers' `split_special_tokens` has it,
    the tokens around turns in the chat template, which DeepSeek's tokenizers do not call special: `<｜User｜>`,
    and in what a model only reads (system, user, tool results, tools), whatever else of its added tokens the chat
    template writes: marks of thoughts and of tool calls, which answers and texts have for good.

Rows that have none of them are tokenized by the tokenizer itself. For the others there is a copy of it in which
control tokens are spelled with a character in front that no text has: so what the template wrote gets that spelling,
what the row says does not, and all else is read as it always is.
"""

import contextlib
import functools
import json
import re
from collections.abc import Callable
from typing import Any

from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from ..errors import first_line
from .messages import BROKEN, MARK, REAL, parse_json
from .report import RowError
from .templates import THOUGHTS, ChatTemplate

_LOOKAHEAD = 64  # characters behind a word by which a tokenizer decides where it ends; those known look at two


class Words:
    """How a tokenizer reads the texts of rows.

    Args:
        tokenizer: its chat template says which tokens stand around turns.
        split_special_tokens: control tokens in the text of a row are text; else they are what they are called.

    Attributes:
        control_ids: ids of the control tokens.
        rows_as_text: rows so far in which that made a difference.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, split_special_tokens: bool = True):
        self.tokenizer, self.splits = tokenizer, split_special_tokens
        self.rows_as_text = 0
        added = tokenizer.added_tokens_decoder
        self._margin = _LOOKAHEAD + max((len(token.content) for token in added.values()), default=0)
        # A single word among others is no mark.
        self._added = {number: token for number, token in added.items() if not token.single_word}
        special = {token.content for token in self._added.values() if token.special}
        template = json.dumps(tokenizer.chat_template or "", ensure_ascii=False)
        others = {token.content for token in self._added.values()} - special
        marks = {mark for mark in others if mark in template and not (mark[0].isalnum() or mark[-1].isalnum())}
        # R1's template looks for `</think>` alone, but `<think>` is its other half.
        self._special = special
        self._marks = marks | (others & {mark.replace("</", "<", 1) for mark in marks})
        self.control_ids = {n for n, token in self._added.items() if token.content in special | self._marks}
        self._all = _any_of(special | self._marks)
        self._own: re.Pattern[str] | None = None
        self._copy: tuple[Tokenizer, dict[int, int]] | None = None

    def ids(self, text: str, room: int | None = None) -> tuple[list[int], bool]:
        """Token ids of a piece of a row, and whether these are all.

        Args:
            text: as `escaped` and then the template left it.
            room: so many ids of the beginning, or some more, are enough; None for all.

        Raises:
            RowError: the tokenizer fails on the text.
        """
        if BROKEN in text:
            spelled = self._all.sub(lambda found: REAL + found[0], text).replace(BROKEN, "")
            copy, numbers = self._copied()
            ids, whole = self._read(lambda part: copy.encode(part, add_special_tokens=False), spelled, room)
            return [numbers.get(number, number) for number in ids], whole
        if not self.tokenizer.is_fast:
            return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], True
        return self._read(self._encode, text, room)

    def escaped_text(self, text: str) -> str:
        """A text of which control tokens stay text."""
        return self._broken(text, True)

    def escaped_messages(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Messages, as `checked_messages` has them, in which control tokens stay text through the template."""
        return [
            {
                key: value
                if key == "role"
                else self._broken(value, message["role"] == "assistant" and key in ("content", *THOUGHTS))
                for key, value in message.items()
            }
            for message in messages
        ]

    def escaped_tools(self, tools: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        """The same of `tools`."""
        return self._broken(tools, False)

    def _broken(self, value: Any, is_said: bool) -> Any:
        """The value with control tokens broken up by a character, which `ids` takes away again."""
        if not self.splits:
            return value
        if isinstance(value, dict):
            return {self._broken(key, is_said): self._broken_item(key, item, is_said) for key, item in value.items()}
        if isinstance(value, list):
            return [self._broken(item, is_said) for item in value]
        if not isinstance(value, str) or not self._all.search(value):
            return value
        control = self._own_control() if is_said else self._all
        broken = value
        while control.search(broken):  # again: breaking one can leave another that began in it
            broken = control.sub(lambda found: found[0][0] + BROKEN + found[0][1:], broken)
        if broken != value and not self.tokenizer.is_fast:
            raise RowError(
                f"the row has the control token {control.search(value)[0]!r} in its text, which this tokenizer, being "
                "code, cannot read as text: leave it out, or set `split_special_tokens: false` to make it the token",
                "control tokens in the text",
            )
        return broken

    def _broken_item(self, key: str, item: Any, is_said: bool) -> Any:
        if key == "arguments" and isinstance(item, str) and "\\u" in item:
            # JSON text, which a template may get as an object: what it spells by numbers is to be seen.
            with contextlib.suppress(ValueError):  # text that a model said need not be JSON
                item = json.dumps(parse_json(item), ensure_ascii=False)
        return self._broken(item, is_said)

    def _own_control(self) -> re.Pattern[str]:
        """The control tokens in what a model writes: of those that the template knows, the ones around turns."""
        if self._own is None:
            turns: set[str] = set()
            if self._marks:
                talk = [{"role": role, "content": MARK} for role in ("user", "assistant", "user")]
                shown, marks = ChatTemplate(self.tokenizer).render(talk).split(MARK), _any_of(self._marks)
                turns = {mark for part in (*shown[:1], *shown[2:]) for mark in marks.findall(part)}
                # Behind what opens an answer stands what the answer begins with: V3.1's `</think>`.
                turns |= {mark for part in shown[1:2] for mark in marks.findall(part)[:1]}
            self._own = _any_of(self._special | turns)
        return self._own

    def _copied(self) -> tuple[Tokenizer, dict[int, int]]:
        """The copy, and the token ids of the tokenizer for those of its added tokens."""
        if self._copy is None:
            names = self._special | self._marks
            made = json.loads(self.tokenizer.backend_tokenizer.to_str())
            made |= {"truncation": None, "padding": None, "post_processor": None}
            model = made["model"]

            def spelled(word: str) -> str:
                return REAL + word if word in names else word

            for token in made["added_tokens"]:
                token["content"] = spelled(token["content"])
            if isinstance(model.get("vocab"), dict):
                model["vocab"] = {spelled(word): number for word, number in model["vocab"].items()}
            else:  # Unigram
                model["vocab"] = [[spelled(word), score] for word, score in model["vocab"]]
            if model.get("unk_token"):
                model["unk_token"] = spelled(model["unk_token"])
            copy = Tokenizer.from_str(json.dumps(made))
            numbers = {copy.token_to_id(spelled(token.content)): number for number, token in self._added.items()}
            self._copy = copy, numbers
        return self._copy

    def _encode(self, text: str) -> Encoding:
        return self.tokenizer(text, add_special_tokens=False, verbose=False).encodings[0]

    def _read(self, encode: Callable[[str], Encoding], text: str, room: int | None) -> tuple[list[int], bool]:
        """The first ids, at least `room` of them if there are so many, exactly as they are in the ids of the text.

        A tokenizer cuts a text into words and reads each by itself, so the end of a text can change its last words
        only: those that it has from `_margin` characters before the end on, and a run of letters or digits there.
        """
        size = len(text) if room is None else 16 * room + 4 * self._margin
        try:
            while size < len(text):
                last = size - self._margin
                while last > 0 and text[last].isalnum():
                    last -= 1
                if last > 0:
                    made = encode(text[:size])
                    if (sure := _words_to(made, last)) >= room:
                        return made.ids[:sure], False
                size *= 4
            return encode(text).ids, True
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # of Rust, which no module has by name
                raise
            raise RowError(
                f"the tokenizer fails on the text: {first_line(error)}", "refused by the tokenizer"
            ) from None


def _words_to(made: Encoding, last: int) -> int:
    """How many ids the words have that end where, at the place `last` of the text or before, another one begins."""
    words, places = made.word_ids, made.offsets
    starts = (i for i in range(len(words) - 1, 0, -1) if words[i] != words[i - 1] and places[i][0] <= last)
    return next(starts, 0)


def words_of(tokenizer: PreTrainedTokenizerBase, split_special_tokens: bool = True) -> Words:
    """The `Words` of a tokenizer, which are the same as long as its template and its tokens are."""
    return _kept(tokenizer, split_special_tokens, json.dumps(tokenizer.chat_template), len(tokenizer))


@functools.lru_cache(maxsize=4)
def _kept(tokenizer: PreTrainedTokenizerBase, split_special_tokens: bool, *state: Any) -> Words:
    return Words(tokenizer, split_special_tokens)


def _any_of(words: set[str]) -> re.Pattern[str]:
    """Matches the longest of the words at the first place where there is one; nothing if there are none."""
    longest_first = sorted(words, key=lambda word: (-len(word), word))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
