"""Settings shared by all tests."""

import os
from pathlib import Path

import pytest
import torch
from checkpoint_folders import tensors_of, written
from tiny import JSON_OF_LINEAGE, tiny_model, v3_config


def pytest_configure(config) -> None:
    """Share the cores between xdist's workers; alone, two threads are enough for the small tensors of these tests."""
    worker_input = getattr(config, "workerinput", None)
    cores = os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // worker_input["workercount"]) if worker_input else min(2, cores))


@pytest.fixture(scope="module")
def v3_tensors(tmp_path_factory) -> dict[str, torch.Tensor]:
    """The tensors of a V3-style checkpoint with one MTP module."""
    folder = tmp_path_factory.mktemp("v3")
    tiny_model(v3_config()).save_pretrained(folder)
    return tensors_of(folder)


@pytest.fixture
def v3_folder(v3_tensors, tmp_path) -> Path:
    return written(tmp_path / "v3", JSON_OF_LINEAGE["v3"], v3_tensors)
