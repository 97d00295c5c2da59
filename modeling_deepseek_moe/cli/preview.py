"""The verb `preview`: rows of data as a model will see them. `main.py` adds it."""

from typing import Annotated

import typer

from modeling_deepseek_moe.errors import UserError

from .use import TrustRemoteCode


def preview(
    source: Annotated[
        str,
        typer.Argument(
            metavar="DATA MODEL | RECIPE",
            help="A file, a folder or the Hub name of a data set, and the model whose tokenizer reads it; a recipe.",
        ),
    ],
    more: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Recipe keys: max_length=512 data_split=test")
    ] = None,
    rows: Annotated[int, typer.Option(help="How many rows to show.", min=0)] = 3,
    limit: Annotated[int, typer.Option(help="The most rows to read for the counts; 0 for all.", min=0)] = 1000,
    full: Annotated[bool, typer.Option("--full", help="Show the middle of long passages, too.")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Show what is learned of the first rows, in colour, and what becomes of the others."""
    from modeling_deepseek_moe.finetune.recipe.load import load_recipe, make_recipe
    from modeling_deepseek_moe.finetune.recipe.values import read_yaml

    model, overrides = None, more or []
    if overrides and "=" not in overrides[0]:
        model, *overrides = overrides
    if model is None:
        recipe = load_recipe(source, overrides)
    else:
        if wrong := next((text for text in overrides if not text.partition("=")[2]), None):
            raise UserError(f"{wrong!r} is not of the form key=value")
        raw = dict(text.split("=", 1) for text in overrides)
        known = {"data": source, "model": model, "output_dir": "preview"}
        recipe = make_recipe({**known, **{key: read_yaml(value, key) for key, value in raw.items()}}, raw)
    from modeling_deepseek_moe.finetune.data.preview import preview_rows
    from modeling_deepseek_moe.finetune.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(recipe.model, trust_remote_code or recipe.trust_remote_code)
    preview_rows(recipe, tokenizer, rows, limit or None, full)
