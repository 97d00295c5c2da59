"""Which files of a folder a model or an adapter consists of; nothing else is published, and nothing behind a link."""

import re
from pathlib import Path

from modeling_deepseek_moe.checkpoint_files import INDEX_NAME, SINGLE_NAME
from modeling_deepseek_moe.conversion.adapters.esft import ESFT_CONFIG, open_esft
from modeling_deepseek_moe.conversion.adapters.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from modeling_deepseek_moe.conversion.engine.beside import CONFIG_NAME, tokenizer_code
from modeling_deepseek_moe.conversion.engine.source import weight_files

from ..errors import UserError

_TOKENIZER = re.compile(
    r"tokenizer(?:_config)?\.json|(?:special_tokens_map|added_tokens|vocab|chat_template)\.json|merges\.txt|vocab\.txt|"
    r"(?:tokenizer|tiktoken|spiece|sentencepiece(?:\.bpe)?)\.model|chat_template\.jinja|"
    r"additional_chat_templates/[\w.-]+\.jinja"
)
_LICENCE = re.compile(r"(?:licen[cs]e|notice)(?:[-_][\w-]+)?(?:\.(?:txt|md))?", re.IGNORECASE)


def parts_of(folder: Path) -> dict[str, Path]:
    """The files of an adapter or a model, with tokenizer and licence, by their names in the folder.

    Raises:
        UserError: one of them is a link, which could lead anywhere.
        CheckpointError: the weights cannot be told.
    """
    if folder.is_symlink():
        raise _link(folder)
    names = _weights(folder) | tokenizer_code(folder)
    parts = {}
    for path in sorted(path for path in folder.rglob("*") if not path.is_dir()):
        name = path.relative_to(folder).as_posix()
        if name in names or is_beside_weights(name):
            check_link(path)
            parts[name] = path
    return parts


def is_beside_weights(name: str) -> bool:
    """Whether a file of this name is of a tokenizer, or says what one may do with a model."""
    return bool(_TOKENIZER.fullmatch(name) or _LICENCE.fullmatch(name))


def check_link(path: Path) -> None:
    """Raise a UserError for a link, which nobody expects to publish what it leads to."""
    if path.is_symlink():
        raise _link(path)


def _weights(folder: Path) -> set[str]:
    if (folder / ESFT_CONFIG).is_file():
        return {ESFT_CONFIG, INDEX_NAME, *open_esft(folder).file_of.values()}
    if (folder / ADAPTER_CONFIG).is_file():
        return {ADAPTER_CONFIG, ADAPTER_WEIGHTS}
    files = weight_files(folder)
    return {CONFIG_NAME, "generation_config.json", *files} | (set() if SINGLE_NAME in files else {INDEX_NAME})


def _link(path: Path) -> UserError:
    return UserError(f"{path} is a link, to {path.resolve()}: nothing is pushed; put the file itself in its place")
