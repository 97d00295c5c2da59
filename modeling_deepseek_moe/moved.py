"""Modules that moved: their old names keep working, with a DeprecationWarning that names the new one."""

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_PACKAGE = __name__.partition(".")[0]
# Every module that README or CHANGELOG named by a name that it no longer has, and where what was in it is now.
MOVED = {
    f"{_PACKAGE}.conversion.convert": (f"{_PACKAGE}.conversion.one_conversion",),
    f"{_PACKAGE}.finetune.callbacks": (f"{_PACKAGE}.finetune.model.balance", f"{_PACKAGE}.finetune.runs.checkpoints"),
    f"{_PACKAGE}.finetune.chat_rows": (f"{_PACKAGE}.finetune.data.chat",),
    f"{_PACKAGE}.finetune.lora": (f"{_PACKAGE}.finetune.model.lora",),
    f"{_PACKAGE}.finetune.row_report": (f"{_PACKAGE}.finetune.data.report",),
    f"{_PACKAGE}.finetune.watch_experts": (f"{_PACKAGE}.finetune.experts.watch",),
}
# Scripts of the checkout that were modules of the package.
LEFT = {f"{_PACKAGE}.finetune.demo_base": "python model_cards/demo_base/scripts/pretrain.py"}


def keep_old_names() -> None:
    """Lets the import system find the old names, after everything that is really there."""
    if not any(isinstance(finder, _MovedFinder) for finder in sys.meta_path):
        sys.meta_path.append(_MovedFinder())


class _MovedFinder(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name in LEFT:
            message = f"{name} is no longer in the package: run `{LEFT[name]}` in a checkout"
            raise ModuleNotFoundError(message, name=name)
        return ModuleSpec(name, _MovedLoader()) if name in MOVED else None


class _MovedLoader(Loader):
    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _MovedModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is in a module that moved."""


class _MovedModule(ModuleType):
    """Gets every name from the modules that took its place.

    It can be called as its namesake function: importing a module puts it under its name into the parent package, which
    may hand out a function of the same name.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        for home in MOVED[self.__name__]:
            if hasattr(module := importlib.import_module(home), name):
                message = f"{self.__name__}.{name} moved: import it from {home}"
                warnings.warn(message, DeprecationWarning, stacklevel=2)
                return getattr(module, name)
        raise AttributeError(f"{self.__name__} moved to {' and '.join(MOVED[self.__name__])}, without {name!r}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        home = importlib.import_module(MOVED[self.__name__][0])
        return getattr(home, self.__name__.rpartition(".")[2])(*args, **kwargs)
