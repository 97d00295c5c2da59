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
    """The choice that `word` is most likely meant for, for "did you mean".

    Names may have a section in front and words between underscores: `epochs` means `training.num_train_epochs`, the
    first name that has these words among its own. Else it is the one that is spelled most alike, as is a name with a
    letter too many or too few.
    """
    section, _, name = word.lower().rpartition(".")

    def closeness(choice: str) -> tuple[int, bool, float]:
        its_section, _, its_name = choice.lower().rpartition(".")
        is_it = difflib.SequenceMatcher(None, name, its_name).ratio() > 0.9
        meant = 2 if is_it else int(set(name.split("_")) < set(its_name.split("_")))
        alike = 0.0 if meant == 1 else difflib.SequenceMatcher(None, word.lower(), choice.lower()).ratio()
        return meant, section == its_section, alike

    return max(choices, key=closeness)


def raised_by(error: BaseException, *packages: str) -> bool:
    """Whether the line that raised an exception is in one of these packages, and not in what they called."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").partition(".")[0] in packages
