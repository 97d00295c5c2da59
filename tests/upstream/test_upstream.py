"""Faults of the libraries, each a script that needs nothing of this package; a release that mends one shows here."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# The library whose release is watched, and the last one that had the fault; None where it is there in all tried.
FAULTS = {
    "accelerate_fsdp_on_cpu": ("accelerate", None),
    "peft_lora_on_experts_under_ep": ("peft", None),
    "peft_rowwise_lora_under_tp": ("peft", None),
    "peft_save_gathers_the_base_model": ("peft", None),
    "transformers_evaluate_before_train": ("transformers", "5.23"),
}


def test_every_script_is_watched():
    assert {path.stem for path in HERE.glob("*_*.py")} - {"test_upstream"} == set(FAULTS)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_the_fault_is_there_in_the_releases_that_had_it(name):
    library, last = FAULTS[name]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(HERE / f"{name}.py")], timeout=300, capture_output=True, env=environment)
    installed = version(library)
    release = tuple(map(int, installed.split(".")[:2]))
    is_expected = last is None or release <= tuple(map(int, last.split(".")))
    said = done.stderr.decode()[-3000:]
    if is_expected:
        assert done.returncode, f"{library} {installed} has mended {name}.py: say so where the fault is worked around"
    else:
        assert not done.returncode, f"{library} {installed} has the fault of {name}.py again: {said}"
