"""What a verb is told to use: a model, an adapter with its base, or a run's folder, in which both are found."""

import os
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError
from ..recipe.load import RUN_RECIPE
from ..recipe.values import read_yaml_file
from .results import is_adapter, is_run, read_results


class Named(NamedTuple):
    """What a name stands for.

    Attributes:
        model: local folder or Hub name.
        adapter: folder or Hub name of the adapter to put on it, None for none.
        before: what a whole model was trained from, where the name was a run's.
    """

    model: str
    adapter: str | None = None
    before: str | None = None


def named(name: str | os.PathLike[str], adapter: str | os.PathLike[str] | None = None) -> Named:
    """Model and adapter behind a name.

    Args:
        name: a model's folder or Hub name; or the folder of a finished run, whose whole model is taken where it saved
            one, and else its adapter on the model that it was trained from; or the folder of an adapter that says
            what it was trained from.
        adapter: folder or Hub name of an adapter, or of a run that saved one.

    Raises:
        UserError: a folder that does not exist; a run that has not come to its end; an adapter twice; or one whose
            base nothing names.
    """
    check_exists(name, f"cannot load model {os.fspath(name)!r}")
    if adapter is not None:
        adapter = named_adapter(adapter)
    folder = Path(name).expanduser()
    if not folder.is_dir() or not (is_run(folder) or _is_only_adapter(folder)):
        return Named(_as_named(name), adapter)
    results = read_results(folder)
    if results.model is not None:
        before = results.base if folder.name != "model" else None
        return Named(os.fspath(results.model), adapter, before)
    if adapter is not None:
        raise UserError(f"{name} has an adapter of its own: leave --adapter out, or name the model instead of {name}")
    if results.base is None:
        raise UserError(
            f"{name} is an adapter, and nothing in it says of which model: name that model, and {name} with --adapter"
        )
    if not Path(results.base).is_dir() and results.base.count("/") != 1:
        raise UserError(
            f"{name} was trained from {results.base}, which does not exist here: name that model where it is now, "
            f"and {name} with --adapter"
        )
    return Named(results.base, os.fspath(results.adapter))


def named_adapter(adapter: str | os.PathLike[str]) -> str:
    """The adapter behind a name: of an adapter's folder or Hub name itself, of a run's folder the one in it.

    Raises:
        UserError: a folder that does not exist, a run without an adapter, or one that has not come to its end.
    """
    check_exists(adapter, f"cannot put adapter {os.fspath(adapter)!r} on the model")
    folder = Path(adapter).expanduser()
    if not is_run(folder):
        return _as_named(adapter)
    found = read_results(folder).adapter
    if found is None:
        raise UserError(f"{adapter} saved a whole model and no adapter: name it as the model")
    return os.fspath(found)


def named_model(name: str) -> str:
    """The whole model behind a name, to train on: of a run's folder the model in it.

    Raises:
        UserError: a folder that does not exist, or that has an adapter only.
    """
    found = named(name)
    if found.adapter is not None:
        raise UserError(
            f"{name} has an adapter and no whole model: merge it first (`deepseek-moe convert {name} DST --to bf16`), "
            "and name DST"
        )
    return found.model


def named_source(source: Path, adapter: Path | None, wants_adapter: bool) -> tuple[Path, Path | None]:
    """What `convert` reads, and the adapter that it merges into that.

    Args:
        source: a folder; of a run its whole model or, where it saved its adapter alone, that one's base.
        adapter: an adapter to merge, or the run that saved it.
        wants_adapter: whether the format is one of adapters; then a run's adapter is the source.

    Raises:
        UserError: as `named`; or the base is on the Hub, from which nothing is converted.
    """
    adapter = None if adapter is None else Path(named_adapter(adapter))
    folder = source.expanduser()
    if not is_run(folder):
        return source, adapter
    if wants_adapter:
        return Path(named_adapter(source)), adapter
    found = named(source, adapter)
    if not Path(found.model).is_dir():
        raise UserError(
            f"{source} was trained from {found.model} on the Hub: download that (`hf download {found.model} "
            f"--local-dir BASE`), then `deepseek-moe convert BASE DST --adapter {source}`"
        )
    return Path(found.model), None if found.adapter is None else Path(found.adapter)


def recipe_of(name: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The recipe of a run's folder, its keys as in `recipe.yaml`; None for every other name."""
    path = Path(name).expanduser() / RUN_RECIPE
    return read_yaml_file(path) if path.is_file() else None


def check_exists(name: str | os.PathLike[str], problem: str) -> None:
    """Raise a UserError for what can only be a folder's path and is none, before the Hub is asked for it.

    Args:
        name: a path, or a name on the Hub.
        problem: how the message begins.
    """
    text = os.fspath(name)
    path = Path(text).expanduser()
    if path.exists() or not (text.startswith((".", "/", "~")) or text.count("/") > 1 or text.endswith("/")):
        return
    parent = next(folder for folder in path.absolute().parents if folder.is_dir())
    raise UserError(f"{problem}: it does not exist; {parent} has {_listing(parent)}")


def _as_named(name: str | os.PathLike[str]) -> str:
    text = os.fspath(name)
    return os.path.expanduser(text) if text.startswith("~") else text


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (", ".join(names[:5]) + more) if names else "nothing in it"


def _is_only_adapter(folder: Path) -> bool:
    return is_adapter(folder) and not (folder / "config.json").is_file()
