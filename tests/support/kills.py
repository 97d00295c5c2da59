"""A program that forks a child for every request it reads, so that only one has to start; the children get killed."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

STOPPED = 130  # exit code of a child that ended as Ctrl-C ends it


class KillServer:
    """The side of the test: starts `program`, which calls `serve`, and asks it for one child after the other."""

    program: str

    def __enter__(self):
        self._process = subprocess.Popen(
            [sys.executable, self.program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *exception) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(60)

    def ask(self, request: dict[str, Any]) -> int:
        """The signal that ended the child, 0 if it finished, 256 times its exit code if it failed.

        `seconds`: a timer kills it then, or with `sigterm` sends it that signal.
        """
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())


def serve(work: Callable[[dict[str, Any]], None]) -> None:
    """The program's side: `work` is done in a child of its own for every line of standard input."""
    import torch

    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            if request.get("sigterm"):
                signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
            if request.get("seconds"):
                signal.setitimer(signal.ITIMER_REAL, request["seconds"])  # the signal's default is the end
            try:
                os.dup2(2, 1)  # answers are the parent's
                work(request)
            except KeyboardInterrupt as stop:
                print(stop, file=sys.stderr)
                os._exit(STOPPED)
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        print(os.WTERMSIG(status) if os.WIFSIGNALED(status) else 256 * os.WEXITSTATUS(status), flush=True)
