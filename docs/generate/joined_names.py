"""An extension of griffe: docstrings may explain several arguments at once, `window, stride: ...`."""

import re

import griffe

_JOINED = re.compile(r"^( +)(\*{0,2}\w+(?:, \*{0,2}\w+)+): ", re.M)


class JoinedNames(griffe.Extension):
    """Gives each of such names a line of its own; all but the first refer to it."""

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring:
            obj.docstring.value = _JOINED.sub(_apart, obj.docstring.value)


def _apart(match: re.Match) -> str:
    indent, (first, *others) = match[1], match[2].split(", ")
    return "".join(f"{indent}{name}: see `{first}`.\n" for name in others) + f"{indent}{first}: "
