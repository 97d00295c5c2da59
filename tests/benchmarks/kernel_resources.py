"""What the compiler makes of the Triton kernels for an H100, without one: a table for `kernels/README.md`.

    python tests/benchmarks/kernel_resources.py [WORDS...]

Each case of `tests/support/triton_cases.py` is compiled, or those whose names begin with one of the words. Registers
and shared memory say how many programs run on one multiprocessor at a time.
"""

import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"  # read when a kernel is defined
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import triton  # noqa: E402
from triton_cases import compile_cases, compiled, launches  # noqa: E402

CAPABILITY = 90
REGISTERS, SHARED_MEMORY, THREADS = 65536, 227 * 1024, 2048  # of one multiprocessor
RESERVED = 1024  # bytes of shared memory that the system takes for each program
COLUMNS = ("case", "kernel", "warps", "registers", "spilled", "shared memory", "programs at a time", "tensor cores")


def main() -> None:
    print(f"Triton {triton.__version__}, compute capability 9.0.\n")
    print("| " + " | ".join(COLUMNS) + " |\n|" + " --- |" * len(COLUMNS))
    for case in compile_cases():
        if case.capability == CAPABILITY and case.id.startswith(tuple(sys.argv[1:]) or ""):
            for launch in launches(case):
                print("| " + " | ".join(_cells(case.id, compiled(*launch, CAPABILITY), launch)) + " |", flush=True)


def _cells(name: str, found: dict, launch: tuple) -> tuple[str, ...]:
    _, _, options = launch
    warps = options.get("num_warps", 4)
    threads = 32 * warps
    at_a_time = min(
        REGISTERS // (threads * -(-found["REG"] // 8) * 8),
        SHARED_MEMORY // (found["shared"] + RESERVED),
        THREADS // threads,
    )
    spilled = found["STACK"] + found["LOCAL"]
    cores = [word for word in ("wgmma", "mma.sync") if found[word]]
    numbers = (str(warps), str(found["REG"]), f"{spilled} bytes", f"{found['shared'] / 1024:.0f} KB", str(at_a_time))
    return (name, f"`{found['kernel'].strip('_')}`", *numbers, ", ".join(cores))


if __name__ == "__main__":
    main()
