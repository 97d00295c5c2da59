"""Kernels compiled for GPUs that need not be there: they use the tensor cores, fit, and spill no registers."""

import json
import os
import subprocess
import sys

import pytest
from places import SUPPORT

pytest.importorskip("triton", reason="Triton is not installed here")

from triton_cases import SHARED_MEMORY, compile_cases

CASES = compile_cases()


@pytest.mark.parametrize("are_slow", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["fast", "slow"])
def test_kernels_fit_the_gpu_and_use_its_tensor_cores(are_slow, tmp_path):
    cases = {case.id: case for case in CASES if case.is_slow == are_slow}
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, SUPPORT / "triton_cases.py", *cases]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    compiled = [json.loads(line) for line in run.stdout.splitlines()]
    assert [line["id"] for line in compiled] == list(cases)
    for line in compiled:
        case = cases[line["id"]]
        assert line["results"], f"{case.id} launches nothing"
        for result in line["results"]:
            assert result["STACK"] + result["LOCAL"] <= case.stack, f"{case.id} spills registers: {result}"
            assert result["shared"] <= SHARED_MEMORY[case.capability], f"{case.id} does not fit: {result}"
        uses = case.instruction is None or any(result[case.instruction] for result in line["results"])
        assert uses, f"{case.id} uses no {case.instruction}: {line}"
