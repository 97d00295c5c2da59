"""The Triton kernels on one GPU: correctness first, then every goal of the benchmark, in one call under ten minutes.

    python tests/benchmarks/gpu.py                         # everything, nine minutes at most
    python tests/benchmarks/gpu.py --sections latent,decode --routing FILE
    python tests/benchmarks/gpu.py --sweep                 # tile configurations instead of the goals
    python tests/benchmarks/gpu.py --predict               # counted operations and bytes, without a GPU
    TRITON_INTERPRET=1 python tests/benchmarks/gpu.py --device cpu   # the checks, tiny and interpreted

Writes gpu.json and gpu.md. Exits with 1 if a result is wrong or a row failed. It needs torch, Triton, transformers,
PEFT and rich, no network and no installed package: it finds the checkout it lies in.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import sys
import time
import traceback
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
NEEDED = ("torch", "triton", "transformers", "peft", "rich")
# What measures a section, and its share of the minutes; Triton compiles in the ones that come first. After a graph
# that cannot be captured torch's allocator frees its cache no more, so "decode" comes late.
SECTIONS = {
    "experts": ("gpu_experts", "experts_row", 3.0),
    "lora": ("gpu_experts", "lora_row", 2.0),
    "latent": ("gpu_attention", "latent_row", 1.5),
    "step": ("gpu_models", "step_row", 1.5),
    "decode": ("gpu_models", "decode_row", 1.0),
    "attention": ("gpu_attention", "attention_row", 1.5),
}


class Parser(argparse.ArgumentParser):
    """Wrong arguments are one line."""

    def error(self, message: str) -> Any:
        self.exit(2, f"{message} (see --help)\n")


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        return _stop(f"gpu.py needs {', '.join(missing)}, which this Python has not: {sys.executable}")
    if importlib.util.find_spec("modeling_deepseek_moe") is None:
        sys.path.insert(0, str(HERE.parents[1]))
    try:
        gpu_rows, gpu_report = importlib.import_module("gpu_rows"), importlib.import_module("gpu_report")
        if options.predict:
            rows = [row for section in options.sections for row in gpu_rows.rows_of(section)]
            print(gpu_report.predicted_table(rows))
            return 0
        return _measure(options, gpu_rows, gpu_report)
    except ImportError as error:
        versions = ", ".join(f"{name} {_version(name)}" for name in NEEDED)
        return _stop(f"{error}: the package does not go with {versions}")


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    names = ", ".join((*SECTIONS, "checks"))
    parser.add_argument("--sections", default="", help=f"of {names}, by commas; all, but on the CPU checks only")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="one size of each kind")
    parser.add_argument("--minutes", type=float, default=9.0, help="no row starts after them")
    parser.add_argument("--repeats", type=int, default=15, help="runs of each side")
    parser.add_argument("--routing", type=Path, help="file of real routing (routing.py) for V2-Lite; else Zipf's law")
    parser.add_argument("--seed", type=int, help="of the checks' inputs; another one each time without")
    parser.add_argument("--output", type=Path, help="folder of the results; on the CPU none are written without it")
    parser.add_argument("--sweep", action="store_true", help="time tile configurations instead of the sections")
    parser.add_argument("--predict", action="store_true", help="print the predictions and stop")
    options = parser.parse_args(arguments)
    words = [word.strip() for word in options.sections.split(",") if word.strip()]
    if unknown := [word for word in words if word not in (*SECTIONS, "checks")]:
        parser.error(f"unknown section {unknown[0]!r}, the sections are {names}")
    if options.minutes <= 0 or options.repeats < 1:
        parser.error(f"--minutes {options.minutes} and --repeats {options.repeats} must be above zero")
    default = [] if options.device == "cpu" and not options.predict else list(SECTIONS)
    options.sections = [name for name in SECTIONS if name in words] if words else default
    if options.output is None and options.device == "cuda":
        options.output = HERE / "results"
    return options


def _measure(options: argparse.Namespace, gpu_rows, gpu_report) -> int:
    import torch
    from gpu_timing import Budget, measured_roofs
    from routing import RoutingFileError

    from modeling_deepseek_moe.kernels.triton.launch import INTERPRETED, refusal

    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        return _stop(
            "torch sees no CUDA device: --predict needs none, and TRITON_INTERPRET=1 with --device cpu checks"
        )
    if device.type == "cuda" and INTERPRETED:
        return _stop("TRITON_INTERPRET is set: unset it, or nothing would be compiled for the GPU")
    if reason := refusal(device):
        return _stop(f"{reason}: set TRITON_INTERPRET=1 to interpret them")
    gc.collect()
    gc.freeze()  # collecting between runs need not look at the libraries
    shares = {"sweep": 1.0} if options.sweep else {name: SECTIONS[name][2] for name in options.sections}
    budget = Budget(options.minutes, shares)
    sizes = gpu_rows.SIZES["tiny" if device.type == "cpu" else "quick" if options.quick else "released"]
    rows = [row for section in options.sections for row in gpu_rows.rows_of(section, sizes)]
    results = {
        "environment": _environment(options, device),
        "checks": [],
        "sections": {},
        "left_out": [],
        "predictions": list(gpu_report.predictions(rows)),
    }
    print(", ".join(f"{name} {value}" for name, value in results["environment"].items()), flush=True)
    results["checks"] = _check(results["environment"]["seed"], device)
    _write(results, options.output, gpu_report)
    if wrong := [check for check in results["checks"] if not check["holds"]]:
        return _stop(f"{len(wrong)} of {len(results['checks'])} results are wrong: nothing is timed")
    print(f"{len(results['checks'])} results agree with float64 references", flush=True)
    if not options.sections and not options.sweep:
        return 0
    results["roofs"] = (roofs := measured_roofs(device, options.repeats))._asdict()
    print(f"product {roofs.flops / 1e12:.4g} TFLOP/s, copy {roofs.bytes / 1e12:.4g} TB/s", flush=True)
    from gpu_experts import GpuBench

    try:
        bench = GpuBench(device, roofs, options.repeats, options.routing)
    except RoutingFileError as error:
        return _stop(str(error))
    if options.sweep:
        return _sweep(bench, sizes, budget, results, options, gpu_report)

    def is_tried(row) -> bool:
        if budget.is_over:
            return False
        _run(bench, row, results, gpu_report, options.output)
        return True

    later = []
    for section in options.sections:
        budget.enter(section)
        bench.release()
        results["sections"][section] = []
        later += [row for row in rows if row.section == section and not is_tried(row)]
    budget.leave()
    results["left_out"] = [row.work for row in later if not is_tried(row)]
    _write(results, options.output, gpu_report)
    for work in results["left_out"]:
        print(f"left out: {work}")
    failed = [row for found in results["sections"].values() for row in found if "error" in row]
    return _stop(f"{len(failed)} rows failed") if failed else 0


def _check(seed: int, device) -> list[dict[str, Any]]:
    from gpu_checks import run_checks

    found = []
    for facts in run_checks(device, seed):
        print(f"{facts[0]['check'].partition(':')[0]}: {len(facts)} results", flush=True)
        found += facts
    for fact in found:
        if not fact["holds"]:
            reason = (
                "" if fact["error"] is None else f": off by {fact['error']:.3g} of the norm, bound {fact['bound']}"
            )
            print(f"WRONG {fact['check']}{reason}", file=sys.stderr)
    return found


def _run(bench, row, results: dict[str, Any], gpu_report, output: Path | None) -> None:
    """Writes what the row gives with the results so far. A failing row leaves the others their turn."""
    import torch

    module, function, _ = SECTIONS[row.section]
    begin = time.monotonic()
    try:
        found = getattr(importlib.import_module(module), function)(bench, row)
    except Exception as error:
        traceback.print_exc()
        found = [{"work": row.work, "error": f"{type(error).__name__}: {error}".splitlines()[0]}]
    results["sections"][row.section] += found
    _write(results, output, gpu_report)
    for each in found:
        print(f"{gpu_report.measured_cells(each)} [{time.monotonic() - begin:.0f} s]", flush=True)
    gc.collect()  # models and their hooks hold each other
    if bench.device.type == "cuda":
        torch.cuda.synchronize()  # a device that no longer works ends the run here
        torch.cuda.empty_cache()


def _sweep(bench, sizes, budget, results, options, gpu_report) -> int:
    from gpu_sweep import sweep

    budget.enter("sweep")
    results["sweep"] = []
    for row in sweep(bench, sizes, budget):
        results["sweep"].append(row)
        time_or_error = (
            row.get("error") or f"{row['seconds'] * 1e3:.4g} ms, {row['flops_per_second'] / 1e12:.0f} TFLOP/s"
        )
        print(f"{row['work']} | {row['tiles']} | {time_or_error}", flush=True)
        _write(results, options.output, gpu_report, name="gpu_sweep")
    print(gpu_report.sweep_table(results["sweep"]))
    return 0


def _environment(options: argparse.Namespace, device) -> dict[str, Any]:
    import torch
    from environment import commit

    found = {"date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"), "device": "cpu"}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = f"{properties.name}, {properties.multi_processor_count} multiprocessors"
        found["CUDA"] = torch.version.cuda
    found |= {"python": sys.version.split()[0], **{name: _version(name) for name in NEEDED[:-1]}}
    found["commit"] = commit() if shutil.which("git") else "unknown"
    found["routing"] = options.routing.name if options.routing else "Zipf"
    found["repeats"] = options.repeats
    return found | {"seed": int.from_bytes(os.urandom(4), "big") if options.seed is None else options.seed}


def _write(results: dict[str, Any], folder: Path | None, gpu_report, name: str = "gpu") -> None:
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(gpu_report.measured_table(results), encoding="utf-8")


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _stop(message: str) -> int:
    print(message, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
