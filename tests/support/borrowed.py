"""Looks up names that the package borrows from libraries."""

import importlib
import inspect


def look_up(name: str) -> object:
    """What `package.module.Class.attribute` is; of `package.module:word`, the module whose code has the word.

    Raises:
        LookupError: there is no such thing; the message holds the whole name.
    """
    path, _, word = name.partition(":")
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            if not hasattr(found, part):
                raise LookupError(f"{name} is gone: {'.'.join(parts[:length])} has no {'.'.join(parts[length:])}")
            found = getattr(found, part)
        if word and word not in inspect.getsource(found):
            raise LookupError(f"{name} is gone: nothing in {path} asks for it")
        return found
    raise LookupError(f"{name} is gone: there is no module of that name")
