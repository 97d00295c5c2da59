"""The command `deepseek-moe`: thin verbs, whose work and whose imports are elsewhere."""

import functools
import inspect
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from modeling_deepseek_moe.errors import UserError

from .esft import score, select
from .preview import preview
from .recipes import Overrides, RecipeName, WithKeys, keys, recipes
from .use import DeviceMap, Model, TextOnly, TrustRemoteCode, chat, evaluate

_HELP = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(
    no_args_is_help=True,
    context_settings=_HELP,
    pretty_exceptions_enable=False,
    help="Fine-tune DeepSeekMoE models with the Hugging Face tools.",
)


_Traceback = Annotated[bool, typer.Option("--traceback", help="Show the whole of an error, with where it came from.")]


def _reported(verb: Callable[..., Any]) -> Callable[..., None]:
    """Shows a user's error, or the system's about a file, as one red line (exit code 1), and Ctrl-C as what it left
    behind (130).

    The verb gets the option `--traceback`, with which that error ends in its traceback, and those of its causes, as
    other errors do anyway.
    """

    @functools.wraps(verb)
    def wrapped(*args: Any, traceback: bool = False, **kwargs: Any) -> None:
        try:
            verb(*args, **{name: _at_home(value) for name, value in kwargs.items()})
        except UserError as error:
            if traceback:
                raise
            _complain(" ".join(str(error).split()))
            raise typer.Exit(1) from error
        except OSError as error:  # of a path that was given; those of a network have no number
            if traceback or error.errno is None or error.filename is None:
                raise
            _complain(f"{str(error.filename)[:200]}: {error.strerror}")
            raise typer.Exit(1) from error
        except KeyboardInterrupt as stop:
            _complain(f"\n{stop}" if str(stop) else "\nstopped")  # below the progress bar and the terminal's ^C
            raise typer.Exit(130) from stop

    # typer reads the options off the signature.
    signature = inspect.signature(verb)
    option = inspect.Parameter("traceback", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=_Traceback)
    wrapped.__signature__ = signature.replace(parameters=[*signature.parameters.values(), option])
    wrapped.__annotations__ = {**verb.__annotations__, "traceback": _Traceback}
    return wrapped


def _at_home(value: Any) -> Any:
    """An argument whose leading `~` is the user's home; a recipe does the same for its keys."""
    if not isinstance(value, str | Path):
        return value
    path = os.path.expanduser(value)
    if path.startswith("~"):
        raise UserError(f"{value}: there is no such user: write the path out")
    return type(value)(path)


def _complain(line: str) -> None:
    Console(stderr=True, soft_wrap=True).print(Text(line, style="bold red"))


def _version(asked: bool) -> None:
    if asked:
        from modeling_deepseek_moe import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command(cls=WithKeys)
@_reported
def finetune(
    recipe: Annotated[str, RecipeName],
    overrides: Overrides = None,
) -> None:
    """Fine-tune a model as a recipe says; the same command goes on where a killed run stopped."""
    from modeling_deepseek_moe.finetune.recipe.load import load_recipe

    settings = load_recipe(recipe, overrides or [])
    from modeling_deepseek_moe.finetune.train.one_run import run

    run(settings)


@app.command()
@_reported
def experts(
    model: Model,
    data: Annotated[str, typer.Argument(help="A JSONL file or the Hub name of a data set.")],
    compare: Annotated[str | None, typer.Option(help="A second one: which experts does each claim?")] = None,
    output: Annotated[Path, typer.Option(help="Folder for experts.png and experts.json.")] = Path("experts"),
    rows: Annotated[int | None, typer.Option(help="At most so many rows, evenly spread; all by default.")] = None,
    max_length: Annotated[int, typer.Option(help="Longer rows are cut to this many tokens.")] = 2048,
    batch_size: Annotated[int, typer.Option(help="Rows in one forward pass.")] = 8,
    split: Annotated[str, typer.Option(help="Which split of Hub data sets.")] = "train",
    adapter: Annotated[str | None, typer.Option(help="Folder or Hub name of a LoRA adapter for the model.")] = None,
    dtype: Annotated[str, typer.Option(help="Type of the weights: auto, float32, bfloat16 or float16.")] = "auto",
    trust_remote_code: TrustRemoteCode = False,
    text_only: TextOnly = False,
    device_map: DeviceMap = None,
) -> None:
    """Run data through a model and show which experts serve it: a table, a picture and JSON."""
    from modeling_deepseek_moe.finetune.experts.report import report_experts

    report_experts(
        model,
        data,
        compare,
        output,
        adapter=adapter,
        split=split,
        rows=rows,
        max_length=max_length,
        batch_size=batch_size,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        text_only=text_only,
        device_map=device_map,
    )


for _verb in (recipes, keys, preview, evaluate, chat):
    app.command()(_reported(_verb))


@app.command()
@_reported
def convert(
    source: Annotated[Path, typer.Argument(help="Folder of a checkpoint, an adapter or a run; it is only read.")],
    target: Annotated[Path, typer.Argument(help="New folder, or one that the same call was stopped in.")],
    to: Annotated[
        str,
        typer.Option(
            help="bf16, fp8, plain, deepseek, deepseek_v2, deepseek_v3, deepseek-inference, upcycle; of adapters "
            "peft, peft-native, peft-per-expert, esft."
        ),
    ],
    dtype: Annotated[
        str | None, typer.Option(help="Type of weights that are not FP8: bfloat16, float16 or float32.")
    ] = None,
    source_format: Annotated[
        str | None, typer.Option("--from", help="deepseek-inference, if SOURCE could be taken for something else.")
    ] = None,
    mp: Annotated[int | None, typer.Option(help="Model-parallel ranks of deepseek-inference; 1 by default.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="LoRA or ESFT adapter to merge into the weights.")] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="MODULE", help="Merge the LoRA of these modules alone: kv_b_proj.")
    ] = None,
    base: Annotated[Path | None, typer.Option(help="The checkpoint that was tuned, for esft.")] = None,
    kv_b_proj: Annotated[
        str | None, typer.Option(help="keep or leave-out: LoRA on kv_b_proj, for peft-per-expert.")
    ] = None,
    experts: Annotated[int | None, typer.Option(help="Routed experts of a layer, for upcycle.")] = None,
    shared_experts: Annotated[int | None, typer.Option(help="Shared experts of a layer, for upcycle.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Routed experts of a token, for upcycle.")] = None,
    dense_layers: Annotated[int | None, typer.Option(help="First layers that upcycle leaves dense.")] = None,
    data: Annotated[Path | None, typer.Option(help="Text or JSONL file whose loss upcycle reports.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read both sides back and compare every tensor.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the source, print the plan, stop.")] = False,
    copy: Annotated[bool, typer.Option("--copy", help="Copy files that stay as they are instead of linking.")] = False,
) -> None:
    """Convert a checkpoint to another format, of any size; the same command goes on where a killed one stopped."""
    from modeling_deepseek_moe.conversion.command import run_convert
    from modeling_deepseek_moe.conversion.request import ADAPTER_FORMATS
    from modeling_deepseek_moe.finetune.runs.named import named_source

    wants_adapter = to in ADAPTER_FORMATS and to != "esft"
    source, adapter = named_source(source, adapter, wants_adapter)
    base = None if base is None else named_source(base, None, False)[0]
    rows = None
    if data is not None:
        from modeling_deepseek_moe.finetune.data.plain_rows import read_rows

        rows = read_rows(source, data)
    run_convert(
        source,
        target,
        to,
        dry_run=dry_run,
        dtype=dtype,
        source_format=source_format,
        mp=mp,
        adapter=adapter,
        only=only,
        base=base,
        kv_b_proj=kv_b_proj,
        upcycle={"experts": experts, "shared_experts": shared_experts, "top_k": top_k, "dense_layers": dense_layers},
        data=rows,
        verify=verify,
        copy=copy,
    )


@app.command()
@_reported
def push(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run, of an adapter or of a model.")],
    to: Annotated[str, typer.Option(metavar="USER/NAME", help="Repository on the Hub.")],
    adapter_only: Annotated[bool, typer.Option("--adapter-only", help="The adapter, also of a merged run.")] = False,
    merged: Annotated[bool, typer.Option("--merged", help="The whole model; merged now if it was not.")] = False,
    native: Annotated[
        str | None, typer.Option(help="The whole model as deepseek, deepseek_v2 or deepseek_v3, for other software.")
    ] = None,
    with_code: Annotated[
        bool, typer.Option("--with-code", help="The whole model with its code, for trust_remote_code=True.")
    ] = False,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Who sees it; a new one is private by default.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Hub name of the base, if the run knows only a folder.")] = None,
    license: Annotated[str | None, typer.Option(help="Licence id for the card: mit; the base's by default.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace whatever the repository holds.")] = False,
) -> None:
    """Publish what a run left, with a model card; the same command goes on where a stopped one was."""
    from modeling_deepseek_moe.finetune.hub.push import push_run

    push_run(
        run,
        to,
        adapter_only=adapter_only,
        merged=merged,
        native=native,
        with_code=with_code,
        private=private,
        base=base,
        license=license,
        force=force,
    )


@app.command()
@_reported
def plan(
    model: Annotated[
        str | None, typer.Argument(help="Folder or Hub name of a model, or a run's folder; only config.json is read.")
    ] = None,
    recipe: Annotated[str | None, RecipeName] = None,
    overrides: Overrides = None,
    gpu_memory: Annotated[str | None, typer.Option(help="Memory of one GPU, with its unit: 24GB.")] = None,
    gpus: Annotated[
        str, typer.Option(metavar="N", help="How many of them, and which layout to take; 8,64 compares numbers.")
    ] = "1",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    table: Annotated[
        bool, typer.Option("--table", help="All shipped recipes on released models; with --gpus, layouts.")
    ] = False,
) -> None:
    """Say how much memory a recipe needs to train a model, where it fits, and what would help; with --gpus, how."""
    from modeling_deepseek_moe.finetune.plan.layout_report import layout_table
    from modeling_deepseek_moe.finetune.plan.report import plan_memory, plan_table, read_gpus
    from modeling_deepseek_moe.finetune.runs.results import is_run

    if table:
        print(plan_table() if gpus == "1" else layout_table(read_gpus(gpus)))
        return
    if model is not None and recipe is None:
        recipe = model if is_run(Path(model)) else "full" if gpus != "1" else None
    if model is None or recipe is None:
        raise typer.BadParameter("name a model and a recipe, or a run, or give --table")
    plan_memory(model, recipe, overrides or [], gpu_memory, gpus, as_json)


@app.command()
@_reported
def demo(
    output_dir: Annotated[Path | None, typer.Option(help="Where to write; a temporary folder by default.")] = None,
    hub_id: Annotated[
        str | None, typer.Option(help="Push to this repository of the real Hub instead of a local server.")
    ] = None,
) -> None:
    """Fine-tune a tiny DeepSeekMoE model with LoRA on this machine and show what it learned."""
    from modeling_deepseek_moe.finetune.demo.one_demo import run_demo

    run_demo(output_dir=output_dir, hub_id=hub_id)


_esft = typer.Typer(no_args_is_help=True, help="Expert-Specialized Fine-Tuning: train the experts that serve a task.")
for _verb in (score, select):
    _esft.command()(_reported(_verb))
app.add_typer(_esft, name="esft")


def main() -> None:
    """Entry point of the `deepseek-moe` script."""
    # PEFT imports bitsandbytes, which warns of a kernel that nothing here asks it for.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    app(prog_name="deepseek-moe")


if __name__ == "__main__":
    sys.exit(main())
