"""Kinds of CPU for what goes by `cpu_rules`: pretended in this process, or a process of its own that has less."""

import os
import subprocess
import sys

import pytest
import torch

from modeling_deepseek_moe import cpu_rules

# What a process reads when it loads torch: no AVX-512 and no AMX on whatever machine.
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}


def pretend(
    monkeypatch: pytest.MonkeyPatch, *half: torch.dtype, has_tiles: bool = False, has_dots: bool = False
) -> None:
    """Rules hold as on a CPU whose oneDNN multiplies the dtypes `half`."""
    kind = cpu_rules.Machine("pretended", half, has_tiles, has_dots)
    monkeypatch.setattr(cpu_rules, "machine", lambda: kind)


def run_on_avx2(*arguments: str) -> str:
    """What Python prints with these arguments, without AVX-512 and AMX."""
    environment = os.environ | AVX2 | {"OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=120, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
