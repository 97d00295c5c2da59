"""Processes of one run end together, and say which of them was the first to."""

import contextlib
import datetime
import itertools
import os
import socket
import time
from collections.abc import Iterator

import psutil
import torch

from .._compat import store_of_processes
from ..errors import UserError, first_line

_PATIENCE = 5.0  # seconds, until a system has forgotten a process that was killed
_GOES_ON = "the same command goes on from the last checkpoint"
_runs, _failures = itertools.count(), itertools.count()


@contextlib.contextmanager
def ended_together() -> Iterator[None]:
    """In a run of several processes, turns what one runs into because another has ended into an error that names it.

    Where torch lets them meet, each process leaves its number in the system and, if it fails, why.

    Raises:
        UserError: another process of the run has ended.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        yield
        return
    store = torch.distributed.PrefixStore(f"run {next(_runs)}", store_of_processes())
    rank = torch.distributed.get_rank()
    store.set(f"process {rank}", f"{socket.gethostname()} {os.getpid()}")
    try:
        yield
    except BaseException as error:
        # As a RuntimeError ends every operation of all processes together in which one is missing.
        if isinstance(error, RuntimeError) and (reason := _other_end(store, rank)):
            raise UserError(reason) from error
        with contextlib.suppress(RuntimeError):  # the process that keeps the store may be gone
            store.set(f"end {rank}", first_line(error))
        raise


def wait_for_failing_processes() -> None:
    """Called by each process of a run that fails: returns in the main one when the others have come here, too.

    If one does not come, after some seconds.
    """
    store = torch.distributed.PrefixStore(f"failure {next(_failures)}", store_of_processes())
    others = [str(rank) for rank in range(1, torch.distributed.get_world_size())]
    with contextlib.suppress(RuntimeError):  # the time is over, or the process that keeps the store is gone
        if rank := torch.distributed.get_rank():
            store.set(str(rank), "here")
        else:
            store.wait(others, datetime.timedelta(seconds=_PATIENCE))


def _other_end(store: torch.distributed.Store, rank: int) -> str | None:
    """Which other process has ended, in a few words; None if none has."""
    ranks = torch.distributed.get_world_size()
    others = [other for other in range(ranks) if other != rank]
    gives_up = time.monotonic() + _PATIENCE
    while True:
        for other in others:
            name = f"process {other} of {ranks}"
            try:
                if store.check([f"end {other}"]):
                    return f"{name} ended the run: {store.get(f'end {other}').decode()}"
                host, number = store.get(f"process {other}").decode().rsplit(maxsplit=1)
            except RuntimeError:
                return f"process 0 of {ranks} died; {_GOES_ON}"  # which keeps the store, if nobody else does
            if host == socket.gethostname() and not _is_alive(int(number)):
                return f"{name} (number {number} on {host}) died; {_GOES_ON}"
        if time.monotonic() > gives_up:
            return None
        time.sleep(0.1)


def _is_alive(number: int) -> bool:
    try:
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
