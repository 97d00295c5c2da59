"""Settings shared by all tests."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoint_folders import tensors_of, written
from convert_folders import bf16_tensors, fp8_folder, ragged_json, sharded
from dense_folders import dense_folder, upcycled
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


@pytest.fixture(scope="module")
def fp8(tmp_path_factory) -> Path:
    """A V3-style checkpoint in FP8 blocks."""
    return fp8_folder(tmp_path_factory.mktemp("source") / "fp8")


@pytest.fixture(scope="module")
def bf16(tmp_path_factory) -> Path:
    """One in bfloat16."""
    json_ = ragged_json()
    folder = tmp_path_factory.mktemp("source")
    return sharded(folder / "bf16", json_, bf16_tensors(json_, folder / "saved"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A dense checkpoint."""
    return dense_folder(tmp_path_factory.mktemp("dense") / "llama")


@pytest.fixture(scope="module")
def experts_of_llama(llama, tmp_path_factory) -> Path:
    """The DeepSeekMoE checkpoint made of it."""
    target = tmp_path_factory.mktemp("upcycled") / "llama"
    upcycled(llama, target)
    return target


@pytest.fixture(scope="session")
def metric_cache(tmp_path_factory) -> Iterator[None]:
    """Metric scripts are copied into a temporary folder, one for the whole session: Python imports them but once."""
    import evaluate

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", tmp_path_factory.mktemp("modules"))
        yield
