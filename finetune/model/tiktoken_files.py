"""Tokenizers of Moonlight and Kimi-K2: tiktoken's files, read without running the code beside them.

`tiktoken.model` has a token a line, its bytes in base64 and its rank, which is its id. A text is cut into pieces by a
pattern, and in each piece that pair of neighbours is merged whose bytes have the lowest rank, the first of equals,
until no pair is a token. Two splits of one token cannot both turn up in a text: what a token's own bytes are merged to
last is the same wherever they stand. So the merges of a byte-level BPE tokenizer, sorted by the rank of what they
make, give the same ids.

The pattern stands in the code that `auto_map` of tokenizer_config.json names. It is taken from there as a literal. The
ids behind the ranks are special tokens: those that `added_tokens_decoder` names, and as many reserved ones as the code
says, `<|reserved_token_ID|>`. Unlike that code nothing is cut after 25,000 characters without a space.
"""

import ast
import base64
import json
import re
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from ..errors import UserError

RANKS = "tiktoken.model"
RESERVED = "<|reserved_token_{}|>"
_CONFIG = "tokenizer_config.json"
# Besides these and the code all that a tokenizer of this kind needs.
FILES = (RANKS, _CONFIG, "special_tokens_map.json", "*.jinja")
# What tokenizers' regular expressions (Oniguruma's) may read otherwise than tiktoken's: anchors of lines, possessive
# counts, and escapes that only one of them has.
_READ_OTHERWISE = re.compile(r"(?<![\\\[])[\^$]|\}\+|\\[bBAzZGKRXhH]")
# Named in the config, but the saved files are of another class, and hold their special tokens elsewhere.
_DROPPED = ("auto_map", "tokenizer_class", "added_tokens_decoder", "vocab_file", "tokenizer_file")


class Unreadable(UserError):
    """A tokenizer whose files do not say all that its code does."""


def read_tiktoken(folder: Path, code: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder with `tiktoken.model`; saved, it is an ordinary one with tokenizer.json.

    Args:
        folder: has FILES and the code.
        code: what `auto_map` names, "tokenization_kimi.TikTokenTokenizer".

    Raises:
        Unreadable: the code says something that has to be run to be known.
        UserError: a file is not what it should be.
    """
    config = json.loads((folder / _CONFIG).read_text("utf-8"))
    ranks = read_ranks(folder / RANKS)
    says = _Code(folder, code)
    names = {"bos_token", "eos_token", "unk_token", "pad_token"}
    fields = {key: value for key, value in config.items() if key not in _DROPPED}
    fields = {key: value for key, value in says.defaults.items() if key in names} | fields
    special = {str(_content(fields[name])) for name in names & fields.keys() if fields[name] is not None}
    special |= {_content(token) for token in fields.get("additional_special_tokens") or ()}
    backend = _Converter(ranks, says.pattern).converted()
    _add_tokens(backend, len(ranks), says.reserved, config.get("added_tokens_decoder") or {}, special, folder)
    fields |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    with tempfile.TemporaryDirectory(prefix="tokenizer-") as name:
        made = Path(name)
        backend.save(str(made / "tokenizer.json"))
        for path in (*folder.glob("*.jinja"), *folder.glob("additional_chat_templates/*.jinja")):
            target = made / path.relative_to(folder)
            target.parent.mkdir(exist_ok=True)
            target.write_text(says.template(path.read_text("utf-8")), "utf-8")
        match fields.get("chat_template"):
            case str(text):
                fields["chat_template"] = says.template(text)
            case list(named):
                fields["chat_template"] = [one | {"template": says.template(one["template"])} for one in named]
        (made / _CONFIG).write_text(json.dumps(fields), "utf-8")
        return PreTrainedTokenizerFast.from_pretrained(made)


def read_ranks(path: Path) -> dict[bytes, int]:
    """Bytes of each token and its rank.

    Raises:
        UserError: a line is not a token and its rank, a rank or a token is there twice, or one of the 256 bytes or
            one of the ranks is missing.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not a token in base64 and its rank: {line[:60]!r}") from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise UserError(f"{path}: its {len(ranks)} tokens do not have the ranks 0 to {len(ranks) - 1}, each once")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise UserError(f"{path}: the byte {missing[0]} is no token, so not every text can be written")
    return ranks


class _Converter(TikTokenConverter):
    """transformers' converter for ranks that were read already."""

    def __init__(self, ranks: dict[bytes, int], pattern: str):
        super().__init__(vocab_file="", pattern=pattern)
        self._ranks = ranks

    def load_tiktoken_bpe(self, tiktoken_url: str) -> dict[bytes, int]:
        return self._ranks


def _add_tokens(
    backend: Tokenizer, first: int, reserved: int, named: dict[str, Any], special: set[str], folder: Path
) -> None:
    """The tokens behind the ranks, whose ids follow one another."""
    named = {int(number): token if isinstance(token, dict) else {"content": token} for number, token in named.items()}
    tokens = []
    for number in range(first, max([first + reserved - 1, *named]) + 1):
        token = named.get(number, {"content": RESERVED.format(number)})
        flags = {key: token.get(key, False) for key in ("lstrip", "rstrip", "single_word", "normalized")}
        is_special = token.get("special", False) or token["content"] in special
        tokens.append(AddedToken(token["content"], special=is_special, **flags))
    backend.add_tokens(tokens)
    for number, token in {**dict(enumerate(tokens, start=first)), **named}.items():
        content = token["content"] if isinstance(token, dict) else token.content
        if backend.token_to_id(content) != number:
            raise UserError(
                f"{folder / _CONFIG}: the special token {content!r} should have the id {number}, but is "
                f"{backend.token_to_id(content)}"
            )


def _content(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else token


class _Code:
    """What the source of a tokenizer's class says in literals.

    Attributes:
        pattern: the regular expression `pat_str`.
        reserved: how many ids lie behind the ranks, `num_reserved_special_tokens`.
        defaults: those of its arguments that are text.
    """

    def __init__(self, folder: Path, code: str):
        module, _, name = code.rpartition(".")
        self._path = folder / f"{module}.py"
        try:
            tree = ast.parse(self._path.read_bytes())
        except (OSError, SyntaxError, ValueError) as error:
            raise Unreadable(f"{self._path}, which says how a text is cut into tokens, cannot be read") from error
        found = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]
        self._body = found[-1].body if found else []
        self.pattern = self._pattern()
        self.reserved = self._literal("num_reserved_special_tokens", int)
        self.defaults = self._defaults()
        self._sorts_tools = self._renders_chats()

    def template(self, text: str) -> str:
        """A chat template with what the code does before it renders one."""
        if not self._sorts_tools:
            return text
        text = re.sub(r"\btools\s*\|\s*tojson\s*\(\s*", "tools | tojson(sort_keys=true, ", text)
        return re.sub(r"\btools\s*\|\s*tojson\b(?!\s*\()", "tools | tojson(sort_keys=true)", text)

    def _pattern(self) -> str:
        pattern = self._literal("pat_str", str)
        if found := _READ_OTHERWISE.search(pattern):
            raise Unreadable(
                f"{self._path}: `pat_str` has {found[0]!r}, which other libraries than tiktoken read otherwise"
            )
        try:
            Regex(pattern)
        except Exception as error:  # tokenizers raises nothing narrower
            raise Unreadable(f"{self._path}: `pat_str` cannot be read: {error}") from error
        return pattern

    def _literal(self, name: str, kind: type) -> Any:
        for node in reversed(self._body):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                value = _evaluated(node.value)
                if isinstance(value, kind):
                    return value
        raise Unreadable(f"{self._path} does not say `{name}` in a form that can be read without running it")

    def _method(self, name: str) -> ast.FunctionDef | None:
        return next((node for node in self._body if isinstance(node, ast.FunctionDef) and node.name == name), None)

    def _defaults(self) -> dict[str, str]:
        made = self._method("__init__")
        if made is None:
            return {}
        plain, keyword = made.args.args[::-1], made.args.kwonlyargs
        pairs = [
            *zip(plain, made.args.defaults[::-1], strict=False),
            *zip(keyword, made.args.kw_defaults, strict=True),
        ]
        values = {argument.arg: _evaluated(value) for argument, value in pairs}
        return {name: value for name, value in values.items() if isinstance(value, str)}

    def _renders_chats(self) -> bool:
        """Whether chats are rendered by the template after the keys of the tools were sorted, not just by it."""
        method = self._method("apply_chat_template")
        if method is None:
            return False
        steps = [ast.unparse(node) for node in method.body]
        if (
            len(steps) == 2
            and steps[0] == "tools = deep_sort_dict(tools)"
            and steps[1].startswith("return super().apply_chat_template(")
        ):
            return True
        raise Unreadable(f"{self._path} renders chats by itself (`apply_chat_template`)")


def _evaluated(node: ast.expr | None) -> Any:
    """The value of a literal, or of literals that are joined; None for anything else."""
    match node:
        case ast.Call(func=ast.Attribute(value=separator, attr="join"), args=[parts], keywords=[]):
            between, texts = _evaluated(separator), _evaluated(parts)
            is_text = isinstance(between, str) and isinstance(texts, list | tuple)
            return between.join(texts) if is_text and all(isinstance(text, str) for text in texts) else None
        case ast.expr():
            try:
                return ast.literal_eval(node)
            except ValueError:
                return None
    return None
