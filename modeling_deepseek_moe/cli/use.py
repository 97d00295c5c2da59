"""Verbs for models as they are: `evaluate` and `chat`. `main.py` adds them to the command."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="Folder or Hub name of a model, or the folder of a run.")]
_Adapter = Annotated[str | None, typer.Option(help="Folder or Hub name of an adapter, or a run that saved one.")]
_Dtype = Annotated[str, typer.Option(help="Type of the weights: auto, float32, bfloat16 or float16.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the tokenizer's code, where it is code.")
]

TextOnly = Annotated[
    bool, typer.Option("--text-only", help="Of a model of several parts, such as Kimi-K2.5, take the text part alone.")
]
DeviceMap = Annotated[
    str | None,
    typer.Option(help="Where parts of the model go: auto, a device, or a JSON object; on one device by default."),
]


def evaluate(
    model: Model,
    adapter: _Adapter = None,
    before: Annotated[
        str | None, typer.Option(help="A model to compare with; with --adapter, the model without it by default.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks of the LM Evaluation Harness: names or paths of YAML files, with commas between."),
    ] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Ask the tasks' questions through the chat template.")
    ] = False,
    text: Annotated[Path | None, typer.Option(help="Text file whose perplexity to measure.")] = None,
    window: Annotated[int | None, typer.Option(help="Tokens of --text at a time; the context, at most 2048.")] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens of --text between windows; half a window.")] = None,
    data: Annotated[str | None, typer.Option(help="Rows with answers: a JSONL file or a Hub data set.")] = None,
    split: Annotated[str, typer.Option(help="Which split of a Hub data set.")] = "test",
    metric: Annotated[
        str | None,
        typer.Option(help="What judges the answers to --data: exact_match, json_match, a path or a Hub name."),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Most tokens of an answer to --data; twice the longest reference by default.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many rows of --data and documents of a task.")] = None,
    batch_size: Annotated[int, typer.Option(help="Questions or windows in one batch.")] = 8,
    output: Annotated[Path, typer.Option(help="Folder for evaluation.json and answers.jsonl.")] = Path("evaluation"),
    dtype: _Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
    text_only: TextOnly = False,
    device_map: DeviceMap = None,
) -> None:
    """Measure a model on benchmarks, a text or rows with answers; before and after in one table."""
    from modeling_deepseek_moe.finetune.evaluate.measure import evaluate_model

    evaluate_model(
        model,
        adapter=adapter,
        before=before,
        tasks=None if tasks is None else [name.strip() for name in tasks.split(",")],
        chat_template=chat_template,
        text=text,
        window=window,
        stride=stride,
        data=data,
        split=split,
        metric=metric,
        max_new_tokens=max_new_tokens,
        limit=limit,
        batch_size=batch_size,
        output=output,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        text_only=text_only,
        device_map=device_map,
    )


def chat(
    model: Model,
    adapter: _Adapter = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 1024,
    temperature: Annotated[
        float | None, typer.Option(help="Temperature of sampling; the model's own, else 0.6.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Share of likely tokens to sample from; the model's own, else 0.95.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of sampling, for the same conversation again.")] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Take the likeliest token instead of sampling.")] = False,
    dtype: _Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
    text_only: TextOnly = False,
    device_map: DeviceMap = None,
) -> None:
    """Talk with a model; /help in it shows what else it can do. Lines of a pipe are messages."""
    from modeling_deepseek_moe.finetune.evaluate.chat import chat as talk

    talk(
        model,
        adapter=adapter,
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        greedy=greedy,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        text_only=text_only,
        device_map=device_map,
    )
