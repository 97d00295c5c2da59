"""The benchmark: this package against transformers with its best settings and PEFT, by turns in one run.

    python tests/benchmarks/run.py                    # everything, sizes of DeepSeek-V2-Lite with two layers
    python tests/benchmarks/run.py decode experts     # these sections; the others' last results are kept
    python tests/benchmarks/run.py decode prefill lora --size glm-4.7-flash    # into results/glm-4.7-flash
    make benchmark ARGS='lora --routing FILE'

Writes benchmark.json, benchmark.md and decode.png. Exits with 1 if both sides do not compute the same, and before it
measures if the folder holds results of another kind of CPU: each kind has a folder of its own (--output).
"""

from __future__ import annotations

import difflib
import gc
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import report
import typer
from rich.console import Console
from rich.text import Text
from routing import RoutingFileError, read_routing

SECTIONS = ("decode", "prefill", "experts", "lora", "train", "load")
SIZES = ("v2-lite", "glm-4.7-flash", "tiny", "tiny-glm")
HERE = Path(__file__).parent

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    sections: Annotated[list[str] | None, typer.Argument(help=f"{', '.join(SECTIONS)}; all by default.")] = None,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each side; fewer where they are slow.")] = 11,
    contexts: Annotated[str, typer.Option(help="Tokens in the cache of a decode step.")] = "256,2048,8192,32768",
    layers: Annotated[int, typer.Option(min=2, help="Of the model; the first has no routed experts.")] = 2,
    routing: Annotated[Path | None, typer.Option(help="File of real routing (tests/benchmarks/routing.py).")] = None,
    size: Annotated[str, typer.Option(help=f"{', '.join(SIZES)}.")] = SIZES[0],
    output: Annotated[
        Path | None, typer.Option(help="Folder of the results; results/, and below it one of another model's size.")
    ] = None,
    only_table: Annotated[bool, typer.Option("--only-table", help="Redraw from benchmark.json.")] = False,
) -> None:
    """Measure both sides by turns and write a table, a picture and JSON."""
    chosen = [_choice("section", name, SECTIONS) for name in sections or SECTIONS]
    _choice("size", size, SIZES)
    lengths = _lengths(contexts)
    output = output or (HERE / "results" if size in ("v2-lite", "tiny") else HERE / "results" / size)
    console = Console(width=None if sys.stdout.isatty() else 200)
    output.mkdir(parents=True, exist_ok=True)
    file = output / "benchmark.json"
    results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"sections": {}}
    if only_table:
        if not results["sections"]:
            _stop(f"{file} does not exist or is empty: run a section first")
        _check_kind(file, results)
        report.write(results, output, console)
        return
    if routing is not None:
        if "glm" in size:
            _stop(f"--routing is of DeepSeek-V2-Lite, 6 experts a token; --size {size} draws 4 a token at random")
        try:
            read_routing(routing)
        except RoutingFileError as error:
            _stop(str(error))
    # Read once, when torch is loaded. Threads that wait must sleep, or they hold up the ones that work.
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(threads)}
    from environment import environment, instructions
    from measure import DisagreementError
    from workbench import Settings, Workbench

    torch = importlib.import_module("torch")
    torch.set_num_threads(threads)
    _check_kind(file, results, instructions())
    gc.collect()
    gc.freeze()  # collecting between runs need not look at the libraries
    settings = Settings(size, layers, threads, repeats, lengths, routing)
    try:
        bench = Workbench(settings)
        here = environment(settings)
        for section in sorted(chosen, key=SECTIONS.index):
            rows = _run(section, bench, console)
            results["sections"][section] = {"environment": here, "rows": rows}
            results["sections"] = {name: results["sections"][name] for name in SECTIONS if name in results["sections"]}
            _write_json(results, file)
    except DisagreementError as error:
        _stop(str(error))
    except KeyboardInterrupt:
        done = ", ".join(results["sections"]) or "nothing"
        _stop(f"\nstopped; {file} holds {done}", code=130)
    finally:
        if results["sections"]:
            report.write(results, output, console)


def _run(section: str, bench: Any, console: Console) -> list[dict[str, Any]]:
    cases = importlib.import_module(section).cases(bench)
    rows: list[dict[str, Any]] = []
    for number, case in enumerate(cases, 1):
        with console.status(f"{section} {number} of {len(cases)}: {case.label}"):
            found = case.run()
        if not bench.size.has_goals:
            found = [row | {"goal": None, "reached": None} for row in found]
        for row in found:
            console.print(Text(" | ".join((f"{section} {number} of {len(cases)}", *report.cells(row)))))
        rows += found
    return rows


def _write_json(results: dict[str, Any], file: Path) -> None:
    aside = file.with_suffix(".json.part")
    aside.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    aside.replace(file)


def _check_kind(file: Path, results: dict[str, Any], here: str | None = None) -> None:
    """Ratios of one kind of CPU say nothing of another, so a table holds one kind."""
    kinds = {name: found["environment"]["instructions"] for name, found in results["sections"].items()}
    here = here or next(iter(kinds.values()))
    for name, kind in kinds.items():
        if kind != here:
            _stop(
                f"{file}: section {name!r} was measured on a CPU with {kind}, not {here}; results of different kinds "
                "of machine are not compared: give another folder with --output"
            )


def _choice(kind: str, name: str, choices: tuple[str, ...]) -> str:
    if name not in choices:
        nearest = difflib.get_close_matches(name, choices, n=1, cutoff=0.0)[0]
        _stop(f"unknown {kind} {name!r} (choices: {', '.join(choices)}): did you mean {nearest!r}?")
    return name


def _lengths(text: str) -> tuple[int, ...]:
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) for word in words):
        _stop(f"--contexts {text!r} is not a list of token counts such as 256,2048")
    return tuple(int(word) for word in words)


def _stop(message: str, code: int = 1) -> None:
    Console(stderr=True, soft_wrap=True).print(Text(message, style="bold red"))
    raise typer.Exit(code)


if __name__ == "__main__":
    app()
