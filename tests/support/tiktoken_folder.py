"""A tokenizer as Moonlight and Kimi-K2 have it: tiktoken.model, tokenizer_config.json, and its code."""

import base64
import json
import random
import unicodedata
from pathlib import Path
from typing import Any

import tokenization_kimi
from tiny import tiny_config, tiny_model
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import bytes_to_unicode

CODE = "tokenization_kimi.TikTokenTokenizer"
TEMPLATE = (
    "{% if tools %}<|im_system|>tools<|im_middle|>{{ tools | tojson }}<|im_end|>{% endif %}"
    "{% for m in messages %}<|im_{{ m.role }}|>{{ m.role }}<|im_middle|>{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_assistant|>assistant<|im_middle|>{% endif %}"
)
NAMED = {0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 3: "<|im_user|>", 4: "<|im_assistant|>", 8: "<|im_middle|>"}
UNKNOWN, PADDING = 254, 255
SOURCE = Path(tokenization_kimi.__file__).read_text(encoding="utf-8")
SORTS_TOOLS = """
    def apply_chat_template(self, conversation, tools=None, **kwargs):
        tools = deep_sort_dict(tools)
        return super().apply_chat_template(conversation, tools=tools, **kwargs)


def deep_sort_dict(value):
    if isinstance(value, dict):
        return {key: deep_sort_dict(item) for key, item in sorted(value.items())}
    return [deep_sort_dict(item) for item in value] if isinstance(value, list) else value
"""
_SCRIPTS = (
    *((0x20, 0x7F), (0xA0, 0x250), (0x300, 0x400), (0x400, 0x500), (0x590, 0x700), (0x900, 0x980), (0xE00, 0xE80)),
    *((0x1100, 0x1200), (0x2000, 0x2070), (0x3000, 0x3100), (0x4E00, 0x4F00), (0xAC00, 0xAD00), (0xF900, 0xF920)),
    *((0x1D400, 0x1D420), (0x1F300, 0x1F400), (0x20000, 0x20040)),
)
_TRICKY = ["'s", "'S", "'LL", " don't", " ", "  ", "   x", "\n", "\r\n", "\t\n ", "123", "4567", "HTTPServer"]
_TRICKY += [
    "\u3000",
    "\x85",
    "\u2028",
    "'\u017f",
    "}\n///",
    "〇一",
    "漢字's",
    "e\u0301",
    "[BOS",
    "<|im_end|>",
    "[EOS]",
    "\x00",
]


def random_text(rng: random.Random, most: int = 100) -> str:
    """Characters of many scripts, in short runs, and what patterns and special tokens trip over."""
    parts: list[str] = []
    for _ in range(rng.randrange(1, most // 4)):
        if rng.random() < 0.25:
            parts.append(rng.choice([*_TRICKY, f"<|reserved_token_{rng.randrange(600, 896)}|>"]))
        else:
            run = [chr(rng.randrange(*rng.choice(_SCRIPTS))) for _ in range(rng.randrange(1, 5))]
            parts += [c for c in run if unicodedata.category(c) != "Cn"]
    return "".join(parts)


def trained_ranks(size: int = 640) -> dict[bytes, int]:
    """256 bytes and the merges that text of many scripts makes."""
    letters = bytes_to_unicode()
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(tokenization_kimi.TikTokenTokenizer.pat_str), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    rng = random.Random(1)
    words = trainers.BpeTrainer(vocab_size=size, initial_alphabet=sorted(letters.values()), show_progress=False)
    tokenizer.train_from_iterator([random_text(rng) for _ in range(200)], words)
    byte_of = {letter: byte for byte, letter in letters.items()}
    return {bytes(byte_of[c] for c in token): rank for token, rank in tokenizer.get_vocab().items()}


def write_ranks(path: Path, ranks: dict[bytes, int]) -> None:
    lines = [base64.b64encode(token) + b" " + str(rank).encode() for token, rank in ranks.items()]
    path.write_bytes(b"\n".join(lines) + b"\n")


def tiktoken_folder(
    folder: Path, ranks: dict[bytes, int] | None = None, source: str = SOURCE, **config: Any
) -> tuple[Path, int]:
    """Such a tokenizer, and the id of its first special token.

    Args:
        ranks: of the tokens; trained ones by default.
        source: of the code.
        config: keys of tokenizer_config.json that differ; None takes one away.
    """
    ranks = trained_ranks() if ranks is None else ranks
    folder.mkdir(parents=True, exist_ok=True)
    write_ranks(folder / "tiktoken.model", ranks)
    (folder / "tokenization_kimi.py").write_text(source, encoding="utf-8")
    first, names = len(ranks), NAMED | {UNKNOWN: "[UNK]", PADDING: "[PAD]"}
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    added = {str(first + i): {"content": name, "special": i != 8, **flags} for i, name in names.items()}
    fields = {
        "tokenizer_class": "TikTokenTokenizer",
        "auto_map": {"AutoTokenizer": [CODE, None]},
        "added_tokens_decoder": added,
        "additional_special_tokens": ["<|im_end|>", "<|im_user|>", "<|im_assistant|>"],
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
        "unk_token": "[UNK]",
        "pad_token": "[PAD]",
        "chat_template": TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        **config,
    }
    fields = {key: value for key, value in fields.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields), encoding="utf-8")
    return folder, first


def tiktoken_model(folder: Path, **changes: Any) -> Path:
    """A tiny model with such a tokenizer, whose last two reserved tokens lie beyond its vocabulary."""
    _, first = tiktoken_folder(folder, **changes)
    tiny_model(tiny_config("v3", vocab_size=first + 256, pad_token_id=first + PADDING)).save_pretrained(folder)
    return folder
