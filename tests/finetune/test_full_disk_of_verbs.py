"""A disk that is full, really, for the verbs that write a result: one line, nothing left, and the same call works."""

import json
import os
import subprocess
import sys

import pytest
from places import SUPPORT
from tiny_run import counting_rows, write_jsonl

UNSHARE = ("unshare", "-Urm")
VERBS = {
    "experts": ["experts", "{base}", "{rows}", "--output", "{disk}/out"],
    "esft score": ["esft", "score", "{base}", "{rows}", "--output", "{disk}/out.json"],
    "evaluate": ["evaluate", "{base}", "--data", "{rows}", "--max-new-tokens", "2", "--output", "{disk}/out"],
}


@pytest.fixture(scope="module")
def _mounts():
    probe = [*UNSHARE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    try:
        done = subprocess.run(probe, capture_output=True, timeout=60)
    except FileNotFoundError:
        done = None
    if done is None or done.returncode:
        pytest.skip("a disk of one's own cannot be mounted here")


@pytest.mark.slow
@pytest.mark.usefixtures("_mounts")
@pytest.mark.parametrize("moment", ["start", "results"])
@pytest.mark.parametrize("verb", VERBS)
def test_it_is_one_line_and_the_same_call_can_be_repeated(verb, moment, tmp_path, base):
    (tmp_path / "disk").mkdir()
    places = {
        "base": base,
        "disk": tmp_path / "disk",
        "rows": write_jsonl(tmp_path / "r.jsonl", counting_rows("prompt")),
    }
    arguments = [argument.format(**places) for argument in VERBS[verb]]
    done = subprocess.run(
        [*UNSHARE, sys.executable, str(SUPPORT / "full_disk_of_verbs.py"), str(tmp_path / "disk"), moment, *arguments],
        env={**os.environ, "PYTHONPATH": str(SUPPORT), "HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    full, again = found["calls"]
    assert full["exit"] == 1 and full["error"] == "SystemExit(1)", full
    line = full["stderr"].strip().splitlines()[-1]
    assert line.startswith(f"the disk of {tmp_path / 'disk'}") and line.endswith("the same command can be repeated")
    assert not [name for name in found["left"] if name != "out"] and again["exit"] == 0, found
