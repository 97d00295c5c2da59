"""Names that a package hands out when they are asked for (PEP 562), so that importing it imports nothing else."""

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


class _HandsOut(ModuleType):
    """A package in which a submodule does not hide the public name that it shares, as one under an old name does."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not isinstance(value, ModuleType) or name not in vars(self).get("_HOMES", ()):
            super().__setattr__(name, value)


def hand_out(package: str, homes: dict[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package.

    Args:
        package: its `__name__`.
        homes: public names, each with the module that it comes from, relative to the package (`.auto`).
    """

    if "_HOMES" in vars(sys.modules[package]):
        sys.modules[package].__class__ = _HandsOut

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(homes[name], package), name)

    return get, lambda: sorted({*vars(sys.modules[package]), *homes})
