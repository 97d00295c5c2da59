"""Verbs of `deepseek-moe esft`: which experts serve a task, and which of them to train. `main.py` adds them."""

from pathlib import Path
from typing import Annotated

import typer

from .use import DeviceMap, Model, TextOnly, TrustRemoteCode


def score(
    model: Model,
    data: Annotated[str, typer.Argument(help="A JSONL file or the Hub name of a data set.")],
    output: Annotated[Path, typer.Option(help="The file of scores to write.")],
    sample_tokens: Annotated[int, typer.Option(help="Random rows are run until they have so many tokens.")] = 131_072,
    max_length: Annotated[int, typer.Option(help="Longer rows are cut to this many tokens.")] = 4096,
    batch_size: Annotated[int, typer.Option(help="Rows in one forward pass.")] = 8,
    dtype: Annotated[str, typer.Option(help="Type of the weights: auto, float32, bfloat16 or float16.")] = "auto",
    split: Annotated[str, typer.Option(help="Which split of a Hub data set.")] = "train",
    trust_remote_code: TrustRemoteCode = False,
    text_only: TextOnly = False,
    device_map: DeviceMap = None,
) -> None:
    """Run a sample of data through a model and score every expert: how many tokens it serves, with what weight."""
    from modeling_deepseek_moe.finetune.experts.score_data import score_data

    score_data(
        model,
        data,
        output,
        split=split,
        sample_tokens=sample_tokens,
        max_length=max_length,
        batch_size=batch_size,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        text_only=text_only,
        device_map=device_map,
    )


def select(
    scores: Annotated[Path, typer.Argument(help="A file of scores: of `esft score`, or a published one.")],
    output: Annotated[Path, typer.Option(help="The expert_cfg.json to write.")],
    score: Annotated[str, typer.Option(help="token or gate.")] = "token",
    top_p: Annotated[
        float | None,
        typer.Option(help="What the chosen experts' scores sum up to in a layer; 0.2 for token, 0.1 for gate."),
    ] = None,
    shared_experts: Annotated[bool, typer.Option("--shared-experts", help="Train the shared experts, too.")] = False,
    non_expert_modules: Annotated[
        bool, typer.Option("--non-expert-modules", help="Train what is no expert, too.")
    ] = False,
) -> None:
    """Choose the experts to train by their scores; the recipe key `esft.experts` takes the file."""
    from modeling_deepseek_moe.finetune.experts.score_data import select_from

    select_from(
        scores,
        output,
        score=score,
        top_p=top_p,
        shared_experts=shared_experts,
        non_expert_modules=non_expert_modules,
    )
