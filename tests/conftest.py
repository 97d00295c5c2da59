"""Settings shared by all tests."""

import os

import torch


def pytest_configure(config) -> None:
    """Share the cores between xdist's workers; alone, two threads are enough for the small tensors of these tests."""
    worker_input = getattr(config, "workerinput", None)
    cores = os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // worker_input["workercount"]) if worker_input else min(2, cores))
