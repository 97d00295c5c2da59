"""Training runs that are killed, or get a SIGTERM.

A request holds the recipe's `values` and `seconds` after which a timer kills the run, or sends it SIGTERM. Or it holds
an `event`: then the run only begins, with its first step made at once, and kills itself at that disk operation.
"""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kills import KillServer, serve

_OPERATIONS = ("rename", "replace", "unlink", "mkdir", "rmdir", "open", "fsync")


class KilledTraining(KillServer):
    program = __file__

    def run(self, values: dict[str, Any], seconds: float | None = None, sigterm: bool = False) -> int:
        return self.ask({"values": values, "seconds": seconds, "sigterm": sigterm})

    def begin(self, values: dict[str, Any], event: int) -> int:
        return self.ask({"values": values, "event": event})


@contextlib.contextmanager
def killed_at(event: int) -> Iterator[None]:
    """Kills this process before its disk operation number `event`."""
    left, originals = event, {name: getattr(os, name) for name in _OPERATIONS}

    def wrapped(name: str):
        def operation(*arguments, **options):
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return originals[name](*arguments, **options)

        return operation

    for name in _OPERATIONS:
        setattr(os, name, wrapped(name))
    yield
    for name, original in originals.items():
        setattr(os, name, original)


def _serve() -> None:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from modeling_deepseek_moe.finetune.recipe.load import make_recipe
    from modeling_deepseek_moe.finetune.runs.folder import SettleRun, open_run
    from modeling_deepseek_moe.finetune.train import one_run as train

    def work(request: dict[str, Any]) -> None:
        recipe = make_recipe(request["values"])
        if "event" not in request:
            train.run(recipe)
            return
        arguments = TrainingArguments(recipe.output_dir)
        with killed_at(request["event"]), open_run(recipe) as opened:
            (Path(opened.folder) / "before.json").write_text("new")
            opened.keep()
            SettleRun().on_step_end(arguments, TrainerState(is_world_process_zero=True), TrainerControl())

    serve(work)


if __name__ == "__main__":
    _serve()
