"""Metrics by name: where the script of a recipe's `metric` is."""

import os
from pathlib import Path

from ..errors import UserError

SHIPPED_METRICS = {path.parent.name: path for path in sorted((Path(__file__).parents[1] / "metrics").glob("*/*.py"))}


def find_metric(name: str | os.PathLike[str]) -> str:
    """The path of a metric's script; a name that is none of ours and no path is a Hub name and stays as it is.

    Args:
        name: path of a script, of a folder with a script of the folder's name, a shipped metric, or a Hub name.

    Raises:
        UserError: a path where there is no script.
    """
    name = os.fspath(name)
    path = Path(name).expanduser()
    if path.is_file():
        return os.fspath(path)
    if name in SHIPPED_METRICS:
        return os.fspath(SHIPPED_METRICS[name])
    if (path / f"{path.name}.py").is_file():
        return os.fspath(path / f"{path.name}.py")
    if path.exists() or path.suffix == ".py" or name.startswith((".", "/", "~")):
        what = f"has no script {path.name}.py" if path.is_dir() else "does not exist"
        raise UserError(
            f"metric {name!r} {what}: give the path of a metric script, or one of {', '.join(SHIPPED_METRICS)}"
        )
    return name
