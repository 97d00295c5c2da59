"""A disk that gets full, really: whenever it does, one line says so, and the same command goes on."""

import json
import os
import subprocess
import sys

import pytest
from places import SUPPORT
from tiny_run import tiny_values

from modeling_deepseek_moe.finetune.recipe.load import make_recipe
from modeling_deepseek_moe.finetune.train import one_run as train

UNSHARE = ("unshare", "-Urm")


@pytest.fixture(scope="module")
def _mounts():
    probe = [*UNSHARE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    try:
        done = subprocess.run(probe, capture_output=True, timeout=60)
    except FileNotFoundError:
        done = None
    if done is None or done.returncode:
        pytest.skip("a disk of one's own cannot be mounted here")


KINDS = {
    "adapters": {},
    "adapters, merged": {"merge": True},
    "whole model": {"lora.targets": None, "lora.r": None},
}


@pytest.mark.slow
@pytest.mark.usefixtures("_mounts")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "moment, kept",
    [
        ("rows", "no checkpoint was written yet; the same command begins with the first step"),
        ("last row", "no checkpoint was written yet; the same command begins with the first step"),
        ("measure", "no checkpoint was written yet; the same command begins with the first step"),
        ("checkpoint", "checkpoint-2 is saved; the same command goes on from there"),
        ("results", "checkpoint-6 is saved; the same command goes on from there"),
    ],
)
def test_it_is_one_line_and_the_same_command_goes_on(tmp_path, base, kind, moment, kept):
    values = {key: value for key, value in tiny_values(tmp_path, base, **KINDS[kind]).items() if value is not None}
    expected = train.run(make_recipe({**values, "output_dir": str(tmp_path / "elsewhere")}))
    (tmp_path / "values.json").write_text(json.dumps(values))
    (tmp_path / "disk").mkdir()
    command = [*UNSHARE, sys.executable, str(SUPPORT / "full_disk.py")]
    done = subprocess.run(
        [*command, str(tmp_path / "values.json"), str(tmp_path / "disk"), "24", moment],
        env={**os.environ, "PYTHONPATH": str(SUPPORT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["error"].startswith(f"the disk of {tmp_path / 'disk' / 'run'} is full (") and kept in found["error"]
    assert "\n" not in found["error"] and "free " in found["error"]
    assert bool(found["left"]) == (moment not in ("rows", "last row"))
    same = ("steps", "train_loss", "eval_loss_before", "eval_loss_after")
    assert [found["summary"][key] for key in same] == [expected[key] for key in same]
