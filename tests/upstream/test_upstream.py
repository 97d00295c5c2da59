"""Faults of the libraries, each a script that needs nothing of this package; a release that mends one shows here."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.version import Version

HERE = Path(__file__).parent


class Fault(NamedTuple):
    """A fault, and how its script ends.

    Attributes:
        library: whose release is watched.
        says: what the script ends with.
        mended: the first release without it; None while there is none.
        needs: the least release of transformers that has what it is about.
        ranks: how many processes it takes.
    """

    library: str
    says: str
    mended: str | None = None
    needs: str = "5.20.0"
    ranks: int = 2


FAULTS = {
    "accelerate_fsdp_on_cpu": Fault("accelerate", "nothing is sharded: DistributedDataParallel"),
    "peft_lora_on_experts_under_ep": Fault("peft", "got mixed torch.Tensor and DTensor"),
    "peft_lora_under_hsdp": Fault("peft", "must match the size of tensor", needs="5.23.0", ranks=4),
    "peft_rowwise_lora_under_tp": Fault("peft", "is invalid for input of size", needs="5.22.0"),
    "peft_save_gathers_the_base_model": Fault("peft", "tensors of the base model were gathered"),
    "transformers_evaluate_before_train": Fault("transformers", "Tensor-likes are not close", mended="5.24.0"),
}


def test_every_script_is_watched():
    assert {path.stem for path in HERE.glob("*.py")} - {"test_upstream"} == set(FAULTS)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_the_fault_is_there_in_the_releases_that_have_it(name):
    library, says, mended, needs, ranks = FAULTS[name]
    if Version(version("transformers")) < Version(needs):
        pytest.skip(f"transformers has what this is about from {needs} on")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(HERE / f"{name}.py")], timeout=300, capture_output=True, text=True, env=environment
    )
    installed = version(library)
    if mended is not None and Version(installed) >= Version(mended):
        assert done.returncode == 0, f"{library} {installed} has the fault of {name}.py again: {done.stderr[-3000:]}"
        return
    assert done.returncode != 0, f"{library} {installed} has mended {name}.py: stop working around it, and say so here"
    assert says in done.stderr, f"{name}.py ends otherwise under {library} {installed}: {done.stderr[-3000:]}"
