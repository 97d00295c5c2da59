"""Settings shared by all tests."""

# ruff: noqa: E402
import os

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined: on CPU its body then runs as Python

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_folders import tensors_of, written
from convert_folders import bf16_tensors, fp8_folder, ragged_json, sharded
from dense_folders import dense_folder, upcycled
from huggingface_hub import HfApi
from tiny import JSON_OF_LINEAGE, tiny_config, tiny_model, v3_config


def pytest_addoption(parser) -> None:
    parser.addoption(
        "--transformers-folder",
        action="append",
        default=[],
        metavar="FOLDER",
        help="another release of transformers (pip install --no-deps --target FOLDER transformers==...) under which "
        "exported code is loaded, too; may be given several times",
    )


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


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tiny V3-style model with the tiny tokenizer."""
    from tiny_run import tiny_base

    return tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def go(tmp_path, base) -> Callable[..., dict[str, Any]]:
    """Run a recipe of a few steps, with keys set differently."""
    from tiny_run import tiny_values

    from modeling_deepseek_moe.finetune.recipe.load import make_recipe
    from modeling_deepseek_moe.finetune.train import one_run as train

    return lambda **overrides: train.run(make_recipe(tiny_values(tmp_path, base, **overrides)))


@pytest.fixture(name="sharded")
def model_in_three_files(tmp_path) -> Path:
    """One that is not of a run."""
    from tiny_run import tiny_tokenizer

    tiny_model(tiny_config("v3")).save_pretrained(tmp_path / "model", max_shard_size="200KB")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) == 3
    return tmp_path / "model"


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[Any]:
    """A local Hub that takes large files by git-LFS."""
    from modeling_deepseek_moe.finetune.demo.local_hub import LocalHub

    # The client reads it from the environment when it is imported.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    with LocalHub(tmp_path / "hub", lfs=True) as hub:
        yield hub


@pytest.fixture
def push(hub) -> Callable[..., str]:
    """`push_run` to it."""
    from tiny_run import HUB_TOKEN

    from modeling_deepseek_moe.finetune.hub.push import push_run

    return lambda run, to, **options: push_run(run, to, endpoint=hub.endpoint, token=HUB_TOKEN, **options)


@pytest.fixture
def api(hub) -> HfApi:
    from tiny_run import HUB_TOKEN

    return HfApi(endpoint=hub.endpoint, token=HUB_TOKEN)
