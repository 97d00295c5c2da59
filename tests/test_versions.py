"""The releases of other libraries that are accepted, those that were tried, and what is said of newer ones."""

import re
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from places import ROOT

from modeling_deepseek_moe._compat import HIGHEST_TRIED, warn_of_untried_releases

VERSIONS = ROOT / "tests/versions"


def requirements_in(path: Path) -> dict[str, Requirement]:
    """By name, as all of pip's files spell it, the row that counts for this Python."""
    lines = (line.split(" #")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    rows = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {row.name.lower().replace("_", "-"): row for row in rows if row.marker is None or row.marker.evaluate()}


def pinned(row: Requirement) -> str:
    return str(row.specifier).removeprefix("==")


def bounds() -> dict[str, str]:
    """Lower bounds in pyproject.toml."""
    found = re.findall(r'^    "([\w-]+)>=([\d.]+)', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)
    return {name.lower().replace("_", "-"): bound for name, bound in found}


def with_release(tmp_path: Path, library: str, release: str) -> str:
    """A folder that says `release` of the library is installed, for the front of the path."""
    info = tmp_path / f"{library}-{release}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {library}\nVersion: {release}\n", encoding="utf-8")
    return str(tmp_path)


def test_the_bounds_of_the_package_are_the_lowest_releases_that_the_tests_run_on():
    lowest = requirements_in(VERSIONS / "lowest.txt")
    assert lowest, "tests/versions/lowest.txt is empty"
    for name, row in lowest.items():
        assert Version(bounds()[name]) == Version(pinned(row)), name


@pytest.mark.parametrize("name", ["transformers", "peft", "trl", "accelerate", "huggingface-hub", "datasets"])
def test_a_library_that_the_package_leans_on_is_tried_at_its_lowest_and_its_highest(name):
    assert name in requirements_in(VERSIONS / "lowest.txt")
    # Where Python is too old for the release in constraints.txt, pip takes the newest that it can run.
    assert name in requirements_in(ROOT / "constraints.txt") or sys.version_info < (3, 11)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="constraints.txt names no transformers for this Python")
@pytest.mark.parametrize("name", HIGHEST_TRIED)
def test_the_package_warns_above_what_constraints_name(name):
    assert HIGHEST_TRIED[name] == pinned(requirements_in(ROOT / "constraints.txt")[name])


def test_the_releases_that_were_laid_before_the_environments_are_the_ones_that_run():
    """`make test-versions` does so; in an ordinary run there are none."""
    laid = [Path(entry) for entry in sys.path if Path(entry).parent == ROOT / ".venv/versions"]
    for folder in laid:
        for name, row in requirements_in(VERSIONS / f"{folder.name}.txt").items():
            assert version(name) == pinned(row)


def test_every_path_that_runs_on_each_release_is_there():
    lines = (VERSIONS / "paths").read_text(encoding="utf-8").splitlines()
    paths = [line for line in lines if line and not line.startswith("#")]
    assert [path for path in paths if not (ROOT / path).exists()] == []
    assert len(paths) == len(set(paths))


@pytest.mark.parametrize("name", HIGHEST_TRIED)
def test_a_later_minor_release_is_warned_of_by_both_versions(name, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(with_release(tmp_path, name, "99.1.0"))
    with pytest.warns(UserWarning, match=re.escape(f"{name} 99.1.0 is installed, and {HIGHEST_TRIED[name]} is")):
        warn_of_untried_releases()


@pytest.mark.parametrize("name", HIGHEST_TRIED)
def test_a_later_patch_release_is_no_reason_to_warn(name, tmp_path, monkeypatch):
    tried = Version(HIGHEST_TRIED[name])
    monkeypatch.syspath_prepend(with_release(tmp_path, name, f"{tried.major}.{tried.minor}.{tried.micro + 1}"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_untried_releases()


def test_the_import_warns_once(tmp_path):
    code = "import sys; sys.path.insert(0, sys.argv[1]); import modeling_deepseek_moe, modeling_deepseek_moe.loading"
    newer = with_release(tmp_path, "transformers", "5.99.0")
    done = subprocess.run([sys.executable, "-c", code, newer], capture_output=True, text=True, check=True)
    assert done.stderr.count("transformers 5.99.0 is installed, and") == 1
