"""Benchmarks of the LM Evaluation Harness (`lm_eval`) on a model that is already loaded."""

import copy
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modeling_deepseek_moe.distribution import install

from ..data.templates import check_template
from ..errors import UserError, first_line, nearest


def load_tasks(names: Iterable[str]) -> tuple[Any, list[str]]:
    """The harness' task manager, and the names or paths under which it knows the tasks.

    Args:
        names: names of tasks, groups or tags of the harness, or paths of task files (YAML).

    Raises:
        UserError: no task is named, one is unknown, or `lm_eval` is not installed.
    """
    names = [name for name in names if name]
    if not names:
        raise UserError("no task is named: --tasks takes names of the LM Evaluation Harness or paths of task files")
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(f"--tasks needs the LM Evaluation Harness: {install('lm_eval')}") from error
    _quiet()
    files = {name for name in names if Path(name).suffix in (".yaml", ".yml")}
    for name in sorted(files):
        if not Path(name).expanduser().is_file():
            raise UserError(f"task file {name} does not exist")
    # Reading the harness' own tasks takes a while.
    manager = TaskManager(include_defaults=files != set(names))
    for name in names:
        if name not in files and name not in manager.task_index:
            raise UserError(f"unknown task {name!r}: did you mean {nearest(name, manager.all_tasks)!r}?")
    return manager, [os.fspath(Path(name).expanduser()) if name in files else name for name in names]


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    manager: Any,
    names: list[str],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    chat_template: bool = False,
) -> dict[str, float]:
    """The harness' results: numbers by `<task> <metric>`, with `<task> <metric>_stderr` where there is an error bar.

    Every prompt begins with BOS exactly once, if the tokenizer has BOS, whatever its own settings say.

    Args:
        manager, names: what `load_tasks` gives.
        limit: the most documents of each task.
        chat_template: put each prompt through the tokenizer's chat template.

    Raises:
        UserError: a task cannot be loaded or run.
    """
    from lm_eval import simple_evaluate

    _quiet()
    if chat_template:
        check_template(tokenizer)
    language_model = _harness_model()(
        pretrained=model, backend="causal", tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size
    )
    try:
        found = simple_evaluate(
            language_model,
            tasks=names,
            task_manager=manager,
            limit=limit,
            apply_chat_template=chat_template,
            log_samples=False,
            bootstrap_iters=1000,
        )
    except Exception as error:  # tasks bring data, templates and code of their own
        raise UserError(f"tasks {', '.join(names)} failed: {first_line(error)}") from error
    scores = {}
    for task, results in found["results"].items():
        for name, value in results.items():
            metric, _, kind = name.partition(",")
            if isinstance(value, int | float) and metric not in ("alias", "sample_len"):
                scores[f"{task} {metric}{'' if kind in ('', 'none') else f' ({kind})'}"] = float(value)
    return scores


def _quiet() -> None:
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def _harness_model() -> type:
    from lm_eval.models.huggingface import HFLM

    class WithBos(HFLM):
        """Tokenizers of DeepSeek's releases write no BOS by themselves in transformers 5."""

        in_windows = False

        def tok_encode(self, string, add_special_tokens=None, **options):
            if add_special_tokens is not False and not self.in_windows:
                string = self._begun(string)
            return super().tok_encode(string, add_special_tokens=False, **options)

        def tok_batch_encode(self, strings, **options):
            # The harness adds no special tokens where the first string begins with BOS.
            return super().tok_batch_encode([self._begun(string) for string in strings], **options)

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            self.in_windows = True  # whose prefix is BOS already
            try:
                return super().loglikelihood_rolling(requests, disable_tqdm)
            finally:
                self.in_windows = False

        def _begun(self, string: str) -> str:
            bos = self.tokenizer.bos_token
            return string if bos is None or string.startswith(bos) else bos + string

    return WithBos
