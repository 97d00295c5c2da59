"""Errors of fine-tuning, and the two ways to word one that every wing needs."""

import difflib
from collections.abc import Iterable

from modeling_deepseek_moe.errors import UserError

__all__ = ["RecipeError", "UserError", "first_line", "nearest"]


class RecipeError(UserError):
    """A recipe cannot be followed: a key, its value, or keys that do not go together; one line says the way out."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message; the name of its class if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def nearest(word: str, choices: Iterable[str]) -> str:
    """The choice that is spelled most like `word`, for "did you mean"."""
    return difflib.get_close_matches(word, list(choices), n=1, cutoff=0.0)[0]
