"""Errors of fine-tuning, and what every wing needs to word one."""

import difflib
import traceback
from collections.abc import Iterable

from modeling_deepseek_moe.errors import UserError

__all__ = ["RecipeError", "UserError", "first_line", "nearest", "raised_by"]


class RecipeError(UserError):
    """A recipe cannot be followed: a key, its value, or keys that do not go together; one line says the way out."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message; the name of its class if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def nearest(word: str, choices: Iterable[str]) -> str:
    """The choice that is spelled most like `word`, for "did you mean"."""
    return difflib.get_close_matches(word, list(choices), n=1, cutoff=0.0)[0]


def raised_by(error: BaseException, *packages: str) -> bool:
    """Whether the line that raised an exception is in one of these packages, and not in what they called."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").partition(".")[0] in packages
