"""One process at a time works in a folder, and the others are told which."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from modeling_deepseek_moe.finetune.runs import lock
from modeling_deepseek_moe.finetune.runs.lock import Locked, locked

# By its file: the package takes seconds to import.
HOLDER = """
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("lock", sys.argv[2])
lock = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lock)
with lock.locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock until it is told to let go, or killed."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "lock"), lock.__file__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_second_process_is_told_which_one_holds_the_lock(tmp_path, holder):
    with pytest.raises(Locked, match=rf"^process {holder.pid} on .+, since 20\d\d-"), locked(tmp_path / "lock"):
        pytest.fail("two hold it")
    holder.communicate("\n", timeout=60)
    assert not (tmp_path / "lock").exists()
    with locked(tmp_path / "lock"):
        assert (tmp_path / "lock").read_text().startswith(f"process {os.getpid()} on ")
    assert not (tmp_path / "lock").exists()


def test_a_killed_process_holds_nothing(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait(60)
    assert (tmp_path / "lock").exists()
    with locked(tmp_path / "lock"):
        assert (tmp_path / "lock").read_text().startswith(f"process {os.getpid()} on ")


def test_the_same_process_does_not_get_it_twice(tmp_path):
    with locked(tmp_path / "lock"), pytest.raises(Locked), locked(tmp_path / "lock"):
        pytest.fail("held twice")


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux alone")
def test_a_forked_worker_does_not_keep_the_lock_of_its_parent(tmp_path):
    context = multiprocessing.get_context("fork")
    began = context.Event()
    with locked(tmp_path / "lock"):
        worker = context.Process(target=work, args=(began,))
        worker.start()
        assert began.wait(60)
        os.rename(tmp_path / "lock", tmp_path / "kept")  # so that the file is not taken away
    try:
        with locked(tmp_path / "kept"):
            pass
    finally:
        worker.kill()
        worker.join()


def work(began):
    began.set()
    time.sleep(600)


def take(path, count, seen):
    """Take the lock again and again, and look whether somebody else has it, too."""
    taken = 0
    while taken < count:
        try:
            with locked(path):
                with seen.get_lock():
                    seen.value += 1
                    assert seen.value == 1
                taken += 1
                with seen.get_lock():
                    seen.value -= 1
        except Locked:
            continue


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux alone")
def test_of_many_that_take_the_file_away_again_only_one_has_it(tmp_path):
    context = multiprocessing.get_context("fork")
    seen = context.Value("i", 0)
    workers = [context.Process(target=take, args=(tmp_path / "lock", 200, seen)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert not (tmp_path / "lock").exists()
