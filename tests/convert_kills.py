"""Conversions that are killed: one program forks a child for every line it reads, so that only one has to start.

Each line is a JSON object: `source`, `target`, `to`, other `options` of `convert`, and `event` (the child kills
itself at that disk operation, in the middle of it if it is a write) or `seconds` (a timer kills it). The answer is the
child's signal, 0 if it finished.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys

_OPERATIONS = ("pwrite", "copy_file_range", "fsync", "replace", "unlink", "link", "mkdir", "open")


@contextlib.contextmanager
def killed_at(event: int | None):
    """Counts disk operations of this process, and kills it at number `event`; yields the list that counts them."""
    seen: list[str] = []
    originals = {name: getattr(os, name) for name in _OPERATIONS}

    def wrapped(name: str):
        def operation(*arguments, **options):
            seen.append(name)
            if len(seen) - 1 == event:
                if name == "pwrite":
                    descriptor, data, offset = arguments
                    originals[name](descriptor, memoryview(data)[: len(data) // 2], offset)
                os.kill(os.getpid(), signal.SIGKILL)
            return originals[name](*arguments, **options)

        return operation

    for name in _OPERATIONS:
        setattr(os, name, wrapped(name))
    try:
        yield seen
    finally:
        for name, original in originals.items():
            setattr(os, name, original)


class KilledConversions:
    """The parent's side: starts the program, and asks it for one killed conversion after the other."""

    def __enter__(self) -> "KilledConversions":
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *exception) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(60)

    def run(
        self, source, target, to: str, *, event: int | None = None, seconds: float | None = None, **options
    ) -> int:
        request = {"source": str(source), "target": str(target), "to": to, "options": options}
        request |= {"event": event, "seconds": seconds}
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())


def _serve() -> None:
    import torch

    from modeling_deepseek_moe.conversion import UpcycleOptions, convert

    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    for line in sys.stdin:
        request = json.loads(line)
        if "upcycle" in request["options"]:
            request["options"]["upcycle"] = UpcycleOptions(**request["options"]["upcycle"])
        child = os.fork()
        if child == 0:
            if request["seconds"]:
                signal.setitimer(signal.ITIMER_REAL, request["seconds"])  # the signal's default is the end
            with killed_at(request["event"]):
                convert(request["source"], request["target"], request["to"], **request["options"])
            os._exit(0)
        print(os.WTERMSIG(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    _serve()
