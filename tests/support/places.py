"""Folders of the checkout that tests read."""

from pathlib import Path

SUPPORT = Path(__file__).resolve().parent
TESTS = SUPPORT.parent
ROOT = TESTS.parent
BENCHMARKS = TESTS / "benchmarks"
GOLDEN = TESTS / "fixtures" / "golden"
SIBLINGS = TESTS / "fixtures" / "siblings"
GOLDEN_FOLDERS = sorted(path.parent for path in GOLDEN.glob("*/config.json"))
