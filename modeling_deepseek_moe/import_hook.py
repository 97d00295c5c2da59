"""Calls back the moment transformers' registries are there, however late; until then it imports nothing.

transformers imports its parts when they are first used, and in the midst of each other: its list of configurations,
for one, while `transformers.modeling_utils` is half done. What registers models needs all of that whole. So modules
are counted while they run, and the call comes when a registry is there and none of them is running any more.
"""

import importlib.util
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# The modules of transformers in which this package registers something.
REGISTRIES = (
    "transformers.models.auto.configuration_auto",
    "transformers.integrations.moe",
    "transformers.modeling_utils",
)
_COUNTED = ("transformers", __name__.partition(".")[0])


def call_with_registries(register: Callable[[], None]) -> None:
    """Calls `register` once: now if transformers has one of `REGISTRIES` already, else as soon as it has.

    An exception that it raises comes out of the import that brought the registry.
    """
    if _registries_are_there():
        register()
    else:
        sys.meta_path.insert(0, _Watch(register))


def _registries_are_there() -> bool:
    return any(name in sys.modules for name in REGISTRIES)


class _Watch(MetaPathFinder):
    """Finds nothing itself; hands on what the other finders find, with loaders that say when a module has run."""

    def __init__(self, register: Callable[[], None]):
        self._register = register
        self._thread = threading.local()
        self._lock = threading.Lock()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.partition(".")[0] not in _COUNTED or getattr(self._thread, "is_searching", False):
            return None
        self._thread.is_searching = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._thread.is_searching = False
        if spec is not None and spec.loader is not None:
            spec.loader = _CountingLoader(spec.loader, self)
        return spec

    def run(self, execute: Callable[[ModuleType], None], module: ModuleType) -> None:
        """Executes a module, and registers if it was the outermost one."""
        self._thread.running = getattr(self._thread, "running", 0) + 1
        try:
            execute(module)
        finally:
            self._thread.running -= 1
        if not self._thread.running and _registries_are_there():
            with self._lock:
                if self not in sys.meta_path:
                    return
                sys.meta_path.remove(self)
            self._register()


class _CountingLoader(Loader):
    """Runs a module by its own loader, which it also leaves to it."""

    def __init__(self, loader: Loader, watch: _Watch):
        self._loader, self._watch = loader, watch

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self._loader
        self._watch.run(self._loader.exec_module, module)

    def __getattr__(self, name: str):
        return getattr(self._loader, name)  # `python -m` asks for the code
