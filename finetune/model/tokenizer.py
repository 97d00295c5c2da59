"""The tokenizer of a model, also where a repository has it as code."""

import os
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from modeling_deepseek_moe import DeepseekMoeConfig
from modeling_deepseek_moe.conversion.engine.beside import code_of_tokenizer

from ..errors import UserError, first_line
from .tiktoken_files import FILES, RANKS, RESERVED, Unreadable, read_tiktoken

# transformers takes its files to be what they should be.
_UNREADABLE = (OSError, ValueError, ImportError, RecursionError, TypeError, AttributeError, KeyError, IndexError)
_ASK = "read it, and if you trust it set `trust_remote_code: true` (--trust-remote-code)"


def load_tokenizer(model: str | os.PathLike[str], trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder or of a model on the Hub.

    Args:
        trust_remote_code: run the tokenizer's code where it is code; nothing else of the repository is run. Without,
            tiktoken's files are read by `tiktoken_files.py`.

    Raises:
        UserError: there is none, it cannot be read, or it is code and `trust_remote_code` does not allow to run it.
    """
    name = os.fspath(model)
    try:
        code = code_of_tokenizer(get_tokenizer_config(name))
        if code and trust_remote_code:
            # With a config at hand transformers looks for none, which may be code, too.
            config = DeepseekMoeConfig.from_pretrained(name)
            return AutoTokenizer.from_pretrained(name, config=config, trust_remote_code=True)
        if code:
            return _read(name, code)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except UserError:
        raise
    except _UNREADABLE as error:
        raise UserError(f"cannot load model {name!r}: {why_not(name, error)}") from error
    if Path(str(getattr(tokenizer, "vocab_file", ""))).name == RANKS:
        raise UserError(
            f"cannot load model {name!r}: its {RANKS} has the tokens but not the pattern that cuts a text into them, "
            "and tokenizer_config.json names no code that says it (`auto_map`)"
        )
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab_size: int, model: str) -> None:
    """Raise a UserError if texts can have tokens that a model of this vocabulary has not.

    Tokens reserved for nothing may lie beyond it: Kimi's code makes two more than the model knows.
    """
    beyond = [token for token, number in tokenizer.get_vocab().items() if number >= vocab_size]
    prefix = RESERVED.partition("{}")[0]
    if any(not token.startswith(prefix) for token in beyond):
        raise UserError(
            f"model {model!r} has vocab_size={vocab_size} but its tokenizer knows {len(tokenizer)} tokens: they do "
            "not belong together"
        )


def why_not(name: str, error: BaseException) -> str:
    """Why something of this name could not be loaded; what no folder has may be on the Hub, or misspelt."""
    reason = first_line(error)
    return reason if os.path.exists(name) else f"there is no such folder, and from the Hub: {reason}"


def _read(name: str, code: str) -> PreTrainedTokenizerBase:
    """A tokenizer that is code, without running that."""
    file = f"{code.rpartition('.')[0]}.py"
    refusal = f"cannot load model {name!r}: its tokenizer is code ({file}), which is not run unasked: {_ASK}"
    if "--" in code:  # in another repository
        raise UserError(refusal)
    folder = Path(name)
    if not folder.is_dir():
        folder = Path(snapshot_download(name, allow_patterns=["tokenizer.json", *FILES, file]))
    if (folder / RANKS).is_file() and not (folder / "tokenizer.json").is_file():
        try:
            tokenizer = read_tiktoken(folder, code)
        except Unreadable as error:
            raise UserError(f"cannot load model {name!r}: {error}; {_ASK}") from error
        tokenizer.name_or_path = name
        return tokenizer
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except ValueError as error:
        raise UserError(refusal) from error
