"""Conversions that are killed.

A request holds `source`, `target`, `to`, other `options` of `convert`, and `event` (the child kills itself at that
disk operation, in the middle of it if it is a write) or `seconds` (a timer kills it).
"""

import contextlib
import os
import signal

from kills import KillServer, serve

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


class KilledConversions(KillServer):
    program = __file__

    def run(
        self, source, target, to: str, *, event: int | None = None, seconds: float | None = None, **options
    ) -> int:
        request = {"source": str(source), "target": str(target), "to": to, "options": options}
        return self.ask({**request, "event": event, "seconds": seconds})


def _serve() -> None:
    from modeling_deepseek_moe.conversion import UpcycleOptions, convert

    def work(request):
        if "upcycle" in request["options"]:
            request["options"]["upcycle"] = UpcycleOptions(**request["options"]["upcycle"])
        with killed_at(request["event"]):
            convert(request["source"], request["target"], request["to"], **request["options"])

    serve(work)


if __name__ == "__main__":
    _serve()
