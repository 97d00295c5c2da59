"""`deepseek-moe evaluate`: benchmarks, perplexity of a text, and a metric of one's own, before and after in one table.

`evaluation.json` holds

    model, adapter, base, dtype   what ran; `base` is what `before` was measured on
    text, data, tasks             what was measured, null for what was not
    before, after                 numbers by name: `text perplexity`, `data exact_match`, `<task> acc`; `before` is
                                  null where there was one model only

and `answers.jsonl` of each row of `--data` the prompt, the reference and what the models said.
"""

import contextlib
import gc
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UserError
from ..files import check_replaceable, nothing_lost_if_full, read_object, replaced, says_full, write_text
from ..model.tokenizer import load_tokenizer
from ..model.use import check_in_place, load_for_use, put_adapter
from ..progress import counting_bar
from ..recipe.metrics import find_metric
from ..runs.named import named
from .answers import Question, generate_answers, questions_of, text_of
from .harness import load_tasks, run_tasks
from .metrics import score_answers
from .perplexity import read_text, score_text

REPORT, ANSWERS = "evaluation.json", "answers.jsonl"


class _Request(NamedTuple):
    """What is measured on each model."""

    tasks: tuple[Any, list[str]] | None
    text: str | None
    window: int | None
    stride: int | None
    questions: list[Question]
    metric: str
    limit: int | None
    batch_size: int
    max_new_tokens: int | None
    chat_template: bool
    trust_remote_code: bool
    text_only: bool
    device_map: str | None


class _Measured(NamedTuple):
    scores: dict[str, float]
    answers: list[str]


def evaluate_model(
    model: str | os.PathLike[str],
    *,
    adapter: str | os.PathLike[str] | None = None,
    tasks: list[str] | None = None,
    chat_template: bool = False,
    text: str | os.PathLike[str] | None = None,
    window: int | None = None,
    stride: int | None = None,
    data: str | os.PathLike[str] | None = None,
    split: str = "test",
    metric: str | os.PathLike[str] | None = None,
    max_new_tokens: int | None = None,
    before: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    output: str | os.PathLike[str] = "evaluation",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    text_only: bool = False,
    device_map: str | None = None,
) -> dict[str, Any]:
    """Measure a model, and what it came from, and print both.

    Args:
        model: local folder or Hub name; of a run's folder the model or the adapter in it (`runs/named.py`).
        adapter: folder or Hub name of an adapter to put on it; then `before` is the model without it.
        tasks: names of the LM Evaluation Harness' tasks, or paths of task files.
        chat_template: ask the tasks' questions through the tokenizer's chat template.
        text: file whose perplexity is measured; `perplexity.py` says how.
        window, stride: tokens that the model sees of it at a time, and by how many the window moves on.
        data: JSONL file or Hub data set with answers; `answers.py` says what is asked.
        split: which split of a Hub data set.
        metric: what judges the answers (`recipe/metrics.py`); by default exact_match.
        max_new_tokens: the most tokens of an answer; by default twice the longest reference.
        before: a second model, to compare with; by default what a run's whole model was trained from.
        limit: the most rows of `data`, evenly spread, and the most documents of each task.
        batch_size: questions or windows in one batch.
        output: folder for `evaluation.json` and `answers.jsonl`, which replace those of an earlier call and no others.
        dtype: type of the weights in memory: auto (as stored), float32, bfloat16 or float16.
        trust_remote_code: run the tokenizer's code where it is code.
        text_only: of a model of several parts load the text part alone.
        device_map: where its parts go, as `device_map` of `from_pretrained`; None for one device (`model/use.py`).

    Returns:
        What `evaluation.json` holds, see the module's docstring.

    Raises:
        UserError: an argument, a model, the data or the metric cannot be used; one line says why.
    """
    if metric is not None and data is None:
        raise UserError("--metric judges answers to the rows of --data: name these as well")
    if not (tasks is not None or text or data):
        raise UserError("nothing to measure: name --tasks, --text or --data")
    for name, value in (("--limit", limit), ("--batch-size", batch_size), ("--max-new-tokens", max_new_tokens)):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}: it is 1 at least")
    metric = os.fspath(metric or "exact_match")
    if data is not None:
        find_metric(metric)
    asked, found = Path(model), named(model, adapter)
    model, adapter = found.model, found.adapter
    before = found.before if before is None else named(before).model
    output = Path(output).expanduser()
    with nothing_lost_if_full(output), _folder(output) as folder:
        tokenizer = load_tokenizer(model, trust_remote_code)
        request = _Request(
            tasks=None if tasks is None else load_tasks(tasks),
            text=None if text is None else read_text(Path(text).expanduser()),
            window=window,
            stride=stride,
            questions=[] if data is None else questions_of(os.fspath(data), split, tokenizer, limit),
            metric=metric,
            limit=limit,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            chat_template=chat_template,
            trust_remote_code=trust_remote_code,
            text_only=text_only,
            device_map=device_map,
        )
        one, other = _measure_both(model, adapter, before, dtype, tokenizer, request)
        base = before if before is not None else model if adapter is not None else None
        report = {
            "model": os.fspath(model),
            "adapter": None if adapter is None else os.fspath(adapter),
            "base": None if base is None else os.fspath(base),
            "dtype": dtype,
            "text": None if text is None else {"file": os.fspath(text), "bytes": len(request.text.encode())},
            "data": None
            if data is None
            else {"source": os.fspath(data), "rows": len(request.questions), "metric": metric},
            "tasks": tasks,
            "limit": limit,
            "before": None if one is None else one.scores,
            "after": other.scores,
        }
        # Both or none: answers are those of the report beside them.
        with contextlib.ExitStack() as stack:
            if request.questions:
                rows = _answer_rows(request.questions, tokenizer, one, other)
                lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                write_text(stack.enter_context(replaced(folder / ANSWERS)), "".join(lines))
            text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
            write_text(stack.enter_context(replaced(folder / REPORT)), text)
    print_scores(report, folder, asked)
    return report


def print_scores(report: dict[str, Any], folder: Path, asked: Path) -> None:
    """Prints the table of scores, and where the files are; `asked` is how the model was named."""
    before, after = report["before"], report["after"]
    name, has_other_adapter = asked.name, os.fspath(asked) == report["model"] and report["adapter"]
    name += f" with {Path(report['adapter']).name}" if has_other_adapter else ""
    table = Table(title=Text(name))
    table.add_column("measure", overflow="fold")
    for column in ("score",) if before is None else ("before", "after", "change"):
        table.add_column(column, justify="right")
    for measure, value in after.items():
        if measure.endswith("_stderr"):
            continue
        if before is None:
            table.add_row(Text(measure), f"{value:.4f}")
        else:
            old = before[measure]
            table.add_row(Text(measure), f"{old:.4f}", f"{value:.4f}", f"{value - old:+.4f}")
    console = Console()
    console.print(table)
    if report["base"] is not None:
        console.print(Text(f"before: {report['base']}"), soft_wrap=True)
    for file in (REPORT, ANSWERS) if report["data"] else (REPORT,):
        console.print(Text(f"{folder / file}"), soft_wrap=True)


def _measure_both(
    model: Any, adapter: Any, before: Any, dtype: str, tokenizer: PreTrainedTokenizerBase, request: _Request
) -> tuple[_Measured | None, _Measured]:
    """Before, None if there is but one model, and after; never are two models in memory."""
    one, keys = None, ("trust_remote_code", "text_only", "device_map")
    loading = {key: getattr(request, key) for key in keys}
    if before is not None:
        network, its_tokenizer = load_for_use(before, dtype, **loading)
        if its_tokenizer.get_vocab() != tokenizer.get_vocab():
            raise UserError(
                f"{os.fspath(before)!r} and {os.fspath(model)!r} have different tokenizers, so they would not read "
                "the same tokens: evaluate each by itself"
            )
        one = _measure(network, tokenizer, request, "before: ")
        del network
        gc.collect()
    network, _ = load_for_use(model, dtype, **loading)
    if adapter is not None:
        check_in_place(network, os.fspath(adapter))
        if before is None:
            one = _measure(network, tokenizer, request, "before: ")
        network = put_adapter(network, adapter).eval()
    return one, _measure(network, tokenizer, request, "after: " if one else "")


def _measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, request: _Request, title: str) -> _Measured:
    scores, answers = {}, []
    if request.text is not None:
        with counting_bar() as progress:
            task = progress.add_task(f"{title}windows", total=None)
            found = score_text(
                model,
                tokenizer,
                request.text,
                window=request.window,
                stride=request.stride,
                batch_size=request.batch_size,
                show=lambda done, of: progress.update(task, completed=done, total=of),
            )
        scores |= {
            "text loss": found.nats / found.tokens,
            "text perplexity": found.perplexity,
            "text bits_per_byte": found.bits_per_byte,
        }
    if request.questions:
        answers = generate_answers(
            model,
            tokenizer,
            request.questions,
            max_new_tokens=request.max_new_tokens,
            batch_size=request.batch_size,
            title=f"{title}answers",
        )
        references = [text_of(question.reference, tokenizer) for question in request.questions]
        scores |= {f"data {key}": value for key, value in score_answers(request.metric, answers, references).items()}
    if request.tasks is not None:
        manager, names = request.tasks
        scores |= run_tasks(
            model,
            tokenizer,
            manager,
            names,
            limit=request.limit,
            batch_size=request.batch_size,
            chat_template=request.chat_template,
        )
    return _Measured(scores, answers)


def _answer_rows(
    questions: list[Question], tokenizer: PreTrainedTokenizerBase, one: _Measured | None, other: _Measured
) -> Iterator[dict[str, str]]:
    for number, question in enumerate(questions):
        row = {
            "prompt": tokenizer.decode(question.prompt),
            "reference": text_of(question.reference, tokenizer),
        }
        if one is not None:
            row["before"] = one.answers[number]
        yield row | {"answer": other.answers[number]}


@contextlib.contextmanager
def _folder(folder: Path) -> Iterator[Path]:
    """The output folder; one that was made for nothing goes away again."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output folder {folder} is a file: name another")
    check_replaceable([folder / REPORT, folder / ANSWERS], lambda: _is_report(folder / REPORT))
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if says_full(error):
            raise
        raise UserError(f"cannot write to output folder {folder}: {error.strerror}") from error
    try:
        yield folder
    except BaseException:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def _is_report(path: Path) -> bool:
    """Whether a file is what `evaluate_model` writes."""
    report = read_object(path)
    return report is not None and {"model", "before", "after"} <= report.keys()
