"""Which quantiser does what with this package's model, as a table for the documentation.

    pip install --no-deps torchao optimum-quanto ninja hqq einops termcolor    # those that are wanted
    python tests/benchmarks/quantisers.py

Tries every quantiser of `tests/support/quantisers.py` on a tiny checkpoint, on the CPU. Exits with 1 if something that
`tests/model/test_quantisers.py` calls working does not work.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import logging
import sys
import tempfile
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from quantisers import QUANTISERS, TRIALS, Quantiser, native_folder  # noqa: E402

_REFUSALS = (
    ValueError,
    RuntimeError,
    NotImplementedError,
    TypeError,
    AttributeError,
    AssertionError,
    ImportError,
    OSError,
)


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    notes: dict[str, int] = {}
    print(f"| quantiser | {' | '.join(TRIALS)} |\n|{'---|' * (len(TRIALS) + 1)}")
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stderr(io.StringIO()):
        folder = native_folder(Path(scratch) / "model")
        for name, quantiser in QUANTISERS.items():
            cells = [_cell(trial, quantiser, folder, notes) for trial in TRIALS.values()]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)
    print()
    for reason, number in notes.items():
        print(f"{number}. {reason}")
    libraries = ("torch", "transformers", "peft", "bitsandbytes", "torchao", "optimum-quanto", "hqq")
    print("\n" + ", ".join(f"{each} {_version(each)}" for each in libraries))


def _cell(trial, quantiser: Quantiser, folder: Path, notes: dict[str, int]) -> str:
    if not quantiser.is_installed:
        return "not installed"
    try:
        result = trial(quantiser, folder)
    except _REFUSALS as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:240]}"
        return f"no ({notes.setdefault(reason, len(notes) + 1)})"
    return result if isinstance(result, str) else "yes"


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    main()
