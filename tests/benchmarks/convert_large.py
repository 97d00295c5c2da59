"""Converts a generated checkpoint of any size: seconds, bytes a second against `cp`, and peak memory of the process.

    python tests/benchmarks/convert_large.py --gigabytes 8 --scratch /tmp/large --output results/convert_large

The checkpoint is a DeepSeek-V2-Lite of small experts with random bfloat16 weights, thousands of tensors in shards of
1 GB. Every round runs, by turns: `cp` of it with a flush to the disk, since conversions flush what they write,
bf16 -> bf16 with `--copy`, bf16 -> fp8 and fp8 -> bf16. Sources have been read before, so that all find them in the
page cache if they fit. Needs three times `--gigabytes` of disk.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from environment import commit, processor
from safetensors.torch import save_file

from modeling_deepseek_moe import DeepseekMoeConfig
from modeling_deepseek_moe.checkpoint_files import INDEX_NAME
from modeling_deepseek_moe.checkpoint_layout import expected_tensors
from modeling_deepseek_moe.presets import PRESETS

CHILD = """
import json, sys, time
from modeling_deepseek_moe.conversion import convert

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024

before, start, cpu = peak(), time.perf_counter(), time.process_time()
report = convert(sys.argv[1], sys.argv[2], sys.argv[3], copy=True)
print(json.dumps({
    "seconds": time.perf_counter() - start,
    "cpu_seconds": time.process_time() - cpu,
    "imports": before,
    "peak": peak(),
}))
"""
EXPERT_BYTES = 64 * 3 * 2 * 1024 * 704


def generate(folder: Path, size: int, shard_size: int) -> None:
    """Writes a checkpoint of about `size` bytes of random normal bfloat16 weights, one shard in memory at a time."""
    small = size < 1e9
    fields = {
        **PRESETS["deepseek-v2-lite"],
        "hidden_size": 256 if small else 1024,
        "moe_intermediate_size": 176 if small else 704,
        "intermediate_size": 1024 if small else 4096,
        "vocab_size": 1024 if small else 32768,
        "first_k_dense_replace": 1,
    }
    fields["num_hidden_layers"] = 1 + max(1, round(size / (EXPERT_BYTES / (16 if small else 1))))
    folder.mkdir(parents=True)
    specs = expected_tensors(DeepseekMoeConfig.from_dict(dict(fields)))
    generator = torch.Generator().manual_seed(0)
    shards: list[list[str]] = [[]]
    held = 0
    for name, (shape, dtype) in specs.items():
        held += torch.Size(shape).numel() * dtype.itemsize
        if held > shard_size and shards[-1]:
            shards.append([])
            held = 0
        shards[-1].append(name)
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        tensors = {
            name: torch.empty(specs[name][0], dtype=specs[name][1]).normal_(std=0.02, generator=generator)
            for name in names
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({**fields, "dtype": None, "torch_dtype": "bfloat16"}))


def weights_of(folder: Path) -> tuple[int, int]:
    """Bytes and number of the weight files."""
    files = list(folder.glob("*.safetensors"))
    return sum(file.stat().st_size for file in files), len(files)


def timed_copy(source: Path, target: Path) -> dict[str, float]:
    start = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    copied = time.perf_counter() - start
    for file in target.iterdir():
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())
    return {"seconds": time.perf_counter() - start, "without flush": copied}


def timed_conversion(source: Path, target: Path, to: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, source, target, to], check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout)


def measure(bf16: Path, scratch: Path, rounds: int) -> dict[str, list[dict[str, float]]]:
    """All rounds of every row; each row's target is removed before the next, but the first FP8 one, which is read."""
    fp8 = scratch / "fp8"
    timed_conversion(bf16, fp8, "fp8")
    results: dict[str, list[dict[str, float]]] = {}
    rows = {
        "cp of the bf16 files": lambda target: timed_copy(bf16, target),
        "bf16 -> bf16": lambda target: timed_conversion(bf16, target, "bf16"),
        "bf16 -> fp8": lambda target: timed_conversion(bf16, target, "fp8"),
        "fp8 -> bf16": lambda target: timed_conversion(fp8, target, "bf16"),
        "cp of the fp8 files": lambda target: timed_copy(fp8, target),
    }
    for _ in range(rounds):
        for name, run in rows.items():
            target = scratch / "target"
            result = run(target)
            result["bytes written"] = weights_of(target)[0]
            results.setdefault(name, []).append(result)
            shutil.rmtree(target)
    return results


def table(results: dict[str, list[dict[str, float]]], facts: dict[str, Any]) -> str:
    columns = [
        "",
        "seconds (least to most)",
        "GB/s written",
        "of cp and flush",
        "CPU seconds",
        "peak MB",
        "of it before",
    ]
    lines = ["| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
    plain = statistics.median(run["bytes written"] / run["seconds"] for run in results["cp of the bf16 files"])
    for name, runs in results.items():
        seconds = sorted(run["seconds"] for run in runs)
        rate = statistics.median(run["bytes written"] / run["seconds"] for run in runs)
        cells = [name, f"{statistics.median(seconds):.2f} ({seconds[0]:.2f} to {seconds[-1]:.2f})"]
        cells += [f"{rate / 1e9:.2f}", f"{rate / plain:.0%}"]
        if "peak" in runs[0]:
            cells += [f"{statistics.median(run['cpu_seconds'] for run in runs):.2f}"]
            cells += [f"{max(run[key] for run in runs) / 1e6:.0f}" for key in ("peak", "imports")]
        lines.append("| " + " | ".join(cells + [""] * (len(columns) - len(cells))) + " |")
    return "\n".join([*lines, "", "Medians. " + ", ".join(f"{name} {value}" for name, value in facts.items()) + "."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scratch", type=Path, required=True, help="folder on the disk to measure; must not exist")
    parser.add_argument("--output", type=Path, help="also write OUTPUT.md and OUTPUT.json")
    arguments = parser.parse_args()
    size = int(arguments.gigabytes * 1e9)
    if arguments.scratch.exists():
        parser.error(f"--scratch {arguments.scratch} exists; give a new folder, which is removed at the end")
    arguments.scratch.mkdir(parents=True)
    try:
        bf16 = arguments.scratch / "bf16"
        generate(bf16, size, shard_size=min(10**9, max(size // 5, 1)))
        total, files = weights_of(bf16)
        index = json.loads((bf16 / INDEX_NAME).read_text())
        facts = {
            "bytes": total,
            "tensors": len(index["weight_map"]),
            "files": files,
            "device": processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "commit": commit(),
            "rounds": arguments.rounds,
        }
        results = measure(bf16, arguments.scratch, arguments.rounds)
    finally:
        shutil.rmtree(arguments.scratch)
    text = table(results, facts)
    print(text)
    if arguments.output:
        arguments.output.with_suffix(".md").write_text(text + "\n")
        arguments.output.with_suffix(".json").write_text(
            json.dumps({"facts": facts, "runs": results}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
