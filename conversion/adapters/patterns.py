"""Regular expressions of adapter configs: those with which a match could take for ever are refused unmatched.

Python's matcher tries one way after the other. How many there are is bounded here from the pattern alone: `a*` of a
name of n characters has n ways, parts after each other multiply theirs, and `(a*)*` has more than one can wait for.
"""

import math
import re
from collections.abc import Iterable

_NAME = 100  # characters of a module's name, more or less
_MOST_WAYS = 100_000_000  # of all patterns of a config together; PEFT puts `(.*\.)?` in front, which multiplies them
_LONGEST = 20_000
_GROUP = re.compile(r"\(\?(?::|=|!|<=|<!|P<\w+>)|\((?!\?)")
_COUNTED = re.compile(r"\{(\d*)(,?)(\d*)\}")


def problem_of_patterns(patterns: Iterable[str]) -> str:
    """What keeps these from being matched against names of modules, in a few words; empty if nothing does."""
    ways = 0.0
    for pattern in patterns:
        if not isinstance(pattern, str):
            return f"{pattern!a} is no text"
        if len(pattern) > _LONGEST:
            return f"a pattern of {len(pattern):,} characters"
        try:
            re.compile(pattern)
            own = ways_of(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            return f"{pattern[:60]!a} is no regular expression ({error})"
        ways += own
        if ways > _MOST_WAYS:
            return f"{pattern[:60]!a} can be matched in too many ways: name the modules, or repeat less"
    return ""


def ways_of(pattern: str) -> float:
    """A bound on the ways to match a regular expression that compiles; infinite for what is not looked into."""
    ways, _, end = _alternatives(pattern, 0)
    return ways if end == len(pattern) else math.inf


def _alternatives(pattern: str, at: int) -> tuple[float, bool, int]:
    """Ways of the alternatives from `at` on, whether they are one text, and where they end."""
    branches: list[tuple[float, str | None]] = []
    while True:
        ways, text, at = _sequence(pattern, at)
        branches.append((ways, text))
        if pattern[at : at + 1] != "|":
            break
        at += 1
    if len(branches) == 1:
        return branches[0][0], branches[0][1] is not None, at
    texts = [text for _, text in branches]
    if None not in texts:
        # Of fixed texts those match in one place that begin with each other: 1 and 10, not 2.
        known = sorted(texts)
        most, chain = 1, []
        for text in known:
            chain = [*(start for start in chain if text.startswith(start)), text]
            most = max(most, len(chain))
        return float(most), False, at
    return sum(ways for ways, _ in branches), False, at


def _sequence(pattern: str, at: int) -> tuple[float, str | None, int]:
    ways, text = 1.0, ""
    while at < len(pattern) and pattern[at] not in "|)":
        start = at
        one, is_text, at = _atom(pattern, at)
        literal = pattern[start:at] if is_text else None
        low, high, at = _repetition(pattern, at)
        if (low, high) != (1, 1):
            literal = None
            if low == high:  # counted even where there is but one way: as many steps
                one = high if one == 1 else one**high if high * math.log(one) < 99 else math.inf
            elif high == 1:
                one += 1
            else:
                one = math.inf if one > 1 else max(low, min(high - low + 1, _NAME))
        ways *= one
        text = None if literal is None or text is None else text + literal
    return ways, text, at


def _atom(pattern: str, at: int) -> tuple[float, bool, int]:
    """Ways of one character, class or group at `at`, whether it is a fixed text, and where it ends."""
    if pattern[at] == "\\":
        escaped = pattern[at + 1]
        # A back-reference is as long as what it refers to; letters stand for classes of characters.
        return (math.inf if escaped in "123456789" else 1.0), not escaped.isalnum(), at + 2
    if pattern[at] == "[":
        end = at + 2 if pattern[at + 1] != "^" else at + 3  # a bracket that stands first is one of the class
        while pattern[end] != "]":
            end += 2 if pattern[end] == "\\" else 1
        return 1.0, False, end + 1
    if pattern[at] != "(":
        return 1.0, pattern[at] not in ".^$", at + 1
    opening = _GROUP.match(pattern, at)
    if not opening:
        return math.inf, False, len(pattern)
    ways, is_text, end = _alternatives(pattern, opening.end())
    return ways, False, end + 1


def _repetition(pattern: str, at: int) -> tuple[float, float, int]:
    """How often what stands before `at` may come, least and most, and where that is said to its end."""
    sign = pattern[at : at + 1]
    low, high, end = 1.0, 1.0, at
    if sign and sign in "*+?":
        low, high, end = (1.0 if sign == "+" else 0.0), (1.0 if sign == "?" else math.inf), at + 1
    elif (counted := _COUNTED.match(pattern, at)) and counted[0] != "{}":
        low = float(counted[1] or 0)
        high = (float(counted[3]) if counted[3] else math.inf) if counted[2] else low
        end = counted.end()
    if end > at and pattern[end : end + 1] in ("?", "+"):  # lazy, possessive
        end += 1
    return low, high, end
