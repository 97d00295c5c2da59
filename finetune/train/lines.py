"""What a run shows while it trains: a short line at each log and each evaluation, and a bar on a terminal.

step 120/300  loss 2.345  lr 1.0e-04  MaxVio 0.35  1,234 tokens/s  2 min left
"""

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import Progress, TaskID
from rich.text import Text
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..progress import counting_bar

# What is shown of a log, by its name there: the name here, and the format.
_SHOWN = {
    "loss": ("loss", ".3f"),
    "rewards/accuracies": ("preferred", ".0%"),
    "learning_rate": ("lr", ".1e"),
    "max_violation": ("MaxVio", ".2f"),
}


@contextlib.contextmanager
def shown_in_lines(trainer: Trainer) -> Iterator[None]:
    """In the block the Trainer, which has its other callbacks by then, reports in lines of ours instead of its own."""
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    lines = ShowLines(bar=not trainer.args.disable_tqdm)
    if trainer.is_world_process_zero():
        trainer.add_callback(lines)
    try:
        yield
    finally:
        lines.close()  # a bar that is left would be drawn over what is said of an error


class ShowLines(TrainerCallback):
    """Prints on stdout; draws bars on stderr where that is a terminal.

    Args:
        bar: draw them.
    """

    def __init__(self, bar: bool = True):
        self._bar = bar and sys.stderr.isatty()
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._training = False
        self._started = self._step_started = self._in_steps = 0.0
        self._first_step = self._tokens = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._training, self._started, self._in_steps = True, time.monotonic(), 0.0
        self._first_step, self._tokens = state.global_step, state.num_input_tokens_seen
        if state.global_step < state.max_steps:
            self._advance("training", state.global_step, state.max_steps)

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._step_started = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._in_steps += time.monotonic() - self._step_started
        self._advance("training", state.global_step, state.max_steps)
        if control.should_training_stop:  # what others print at the end comes before `on_train_end` here
            self._end("training")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        if "eval_loss" in logs and self._training:
            self._print(state, [f"held-out loss {logs['eval_loss']:.3f}"])
        if "loss" not in logs:
            return
        parts = [f"{name} {logs[key]:{style}}" for key, (name, style) in _SHOWN.items() if key in logs]
        tokens, self._tokens = state.num_input_tokens_seen - self._tokens, state.num_input_tokens_seen
        seconds, self._in_steps = self._in_steps, 0.0
        if tokens and seconds:
            parts.append(f"{tokens / seconds:,.0f} tokens/s")
        made, left = state.global_step - self._first_step, state.max_steps - state.global_step
        if made and left:
            parts.append(f"{duration((time.monotonic() - self._started) / made * left)} left")
        self._print(state, parts)

    def on_prediction_step(self, *args: Any, eval_dataloader: Any = None, **kwargs: Any) -> None:
        total = len(eval_dataloader) if hasattr(eval_dataloader, "__len__") else None
        self._advance("held-out rows", None, total)

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self._end("held-out rows")

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._training = False
        self._end("training")

    def close(self) -> None:
        """Takes all bars away."""
        for title in list(self._tasks):
            self._end(title)

    def _print(self, state: TrainerState, parts: list[str]) -> None:
        step = str(state.global_step).rjust(len(str(state.max_steps)))
        line = Text("  ".join([f"step {step}/{state.max_steps}", *parts]))
        # Above a bar only its own console can print.
        live = self._progress is not None and sys.stdout.isatty()
        console = self._progress.console if live else Console()
        console.print(line, highlight=False, soft_wrap=True)

    def _advance(self, title: str, done: int | None, total: int | None) -> None:
        """Moves a bar to what is done, or on by one."""
        if not self._bar:
            return
        if self._progress is None:
            self._progress = counting_bar(stays=False)
            self._progress.start()
        if title not in self._tasks:
            self._tasks[title] = self._progress.add_task(title, total=total)
        if done is None:
            self._progress.advance(self._tasks[title])
        else:
            self._progress.update(self._tasks[title], completed=done)

    def _end(self, title: str) -> None:
        """Takes a bar away; the last one leaves the terminal as if there had been none."""
        if title in self._tasks:
            self._progress.remove_task(self._tasks.pop(title))
        if self._progress is not None and not self._tasks:
            self._progress.stop()
            self._progress = None


def duration(seconds: float) -> str:
    """A time as one reads it: 45 s, 12 min, 3 h 20 min."""
    minutes = round(seconds / 60)
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
