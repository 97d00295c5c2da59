"""SIGTERM, by which clusters announce that they take a machine away: a checkpoint is saved, and the run ends.

transformers' `enable_jit_checkpoint` saves in the middle of a step, when random numbers have been drawn already, so a
run that goes on from there is not the one that was stopped.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class StopAtSigterm(TrainerCallback):
    """After SIGTERM ends a run as Ctrl-C does: in training with a checkpoint after the step at hand, else at once.

    With several processes they stop after the same step, as soon as one of them got the signal. Comes after all
    callbacks that write to a checkpoint.

    Raises:
        KeyboardInterrupt: when the checkpoint is saved, or at once.
    """

    def __init__(self) -> None:
        self._asked = self._stopping = self._training = False
        self._process = os.getpid()

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The handler of the signal; further signals change nothing."""
        if os.getpid() != self._process:  # a worker, which is to end
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        is_first, self._asked = not self._asked, True
        if is_first and not self._training:
            raise KeyboardInterrupt

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._training = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._stopping = self._any_asked()
        control.should_save |= self._stopping

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._training:
            self._stopping = self._any_asked()
            control.should_save |= self._stopping

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        if self._stopping:
            PartialState().wait_for_everyone()  # the main process marks the checkpoint as complete
            raise KeyboardInterrupt

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._training = False
        if self._any_asked():
            raise KeyboardInterrupt

    def _any_asked(self) -> bool:
        if PartialState().num_processes == 1:
            return self._asked
        asked = torch.tensor(int(self._asked), device=PartialState().device)
        torch.distributed.all_reduce(asked)
        return bool(asked.item())


@contextlib.contextmanager
def stopped_by_sigterm() -> Iterator[StopAtSigterm]:
    """A callback that gets the signal while the block runs, where that is the main thread and the signal is heeded."""
    stop = StopAtSigterm()
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is signal.SIG_IGN:
        yield stop
        return
    before = signal.signal(signal.SIGTERM, stop.handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
