"""A saved folder with the package's code in it: loaded where the package is not installed."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_ids, tiny_model, v3_config

import modeling_deepseek_moe
from modeling_deepseek_moe import DeepseekMoeConfig, DeepseekMoeForCausalLM

PACKAGE = Path(modeling_deepseek_moe.__file__).parent
REVISION = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "someone/tiny-deepseek"

# Loads by path and by name, and saves what it computed and what it saves again.
STRANGER = """
import sys
sys.modules["modeling_deepseek_moe"] = None
import torch
from transformers import AutoModelForCausalLM
ids, results = torch.load(sys.argv[1]), {}
for where in sys.argv[3:]:
    model = AutoModelForCausalLM.from_pretrained(where, trust_remote_code=True)
    results[where] = {
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "experts": model.config._experts_implementation,
        "logits": model(ids).logits.detach(),
        "generated": model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0),
    }
model.save_pretrained(sys.argv[2] + "/again")
torch.save(results, sys.argv[2] + "/results.pt")
"""


def siblings_imported_by(source: str) -> set[str]:
    """File names of the `from .x import y` statements of a module, wherever they are."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom) and node.level]
    assert all(node.level == 1 and node.module and "." not in node.module for node in nodes)
    return {f"{node.module}.py" for node in nodes}


def closure_of(*names: str) -> set[str]:
    found, waiting = set(), set(names)
    while waiting:
        name = waiting.pop()
        found.add(name)
        waiting |= siblings_imported_by((PACKAGE / name).read_text(encoding="utf-8")) - found
    return found


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """A model saved with its code, as the README tells to."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    DeepseekMoeConfig.register_for_auto_class()
    DeepseekMoeForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    try:
        tiny_model(v3_config()).save_pretrained(folder)
    finally:
        DeepseekMoeConfig._auto_class = DeepseekMoeForCausalLM._auto_class = None
    return folder


@pytest.fixture(scope="module")
def strangers(exported, tmp_path_factory) -> Path:
    """Where a process without the package left its results; its Hub cache holds the folder as a repository."""
    folder = tmp_path_factory.mktemp("stranger")
    repository = folder / "hub" / f"models--{REPOSITORY.replace('/', '--')}"
    shutil.copytree(exported, repository / "snapshots" / REVISION)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    torch.save(tiny_ids(v3_config()), folder / "ids.pt")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, str(folder / "ids.pt"), str(folder), str(exported), REPOSITORY],
        env={**environment, "HF_HOME": str(folder), "HF_HUB_OFFLINE": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_the_export_is_exactly_the_flat_closure_of_the_model_and_its_config(exported):
    code = {path.name for path in exported.rglob("*.py")}
    assert code == closure_of("modeling_deepseek_moe.py", "configuration_deepseek_moe.py")
    assert code.isdisjoint({"__init__.py", "auto.py", "cli.py", "expert_lora.py"})
    assert not any(path.is_dir() for path in exported.iterdir())


def test_exported_files_import_no_package_but_the_models_own_requirements(exported):
    allowed = {*sys.stdlib_module_names, "torch", "transformers", "safetensors", "huggingface_hub"}
    for path in exported.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert {name.partition(".")[0] for name in names} <= allowed, path.name


def test_the_exported_config_names_the_code_and_stays_readable_by_the_package(exported):
    auto_map = json.loads((exported / "config.json").read_text())["auto_map"]
    assert auto_map == {
        "AutoConfig": "configuration_deepseek_moe.DeepseekMoeConfig",
        "AutoModelForCausalLM": "modeling_deepseek_moe.DeepseekMoeForCausalLM",
    }
    assert type(DeepseekMoeForCausalLM.from_pretrained(exported)) is DeepseekMoeForCausalLM


@pytest.mark.parametrize("by_name", [False, True], ids=["from the folder", "from a Hub cache by name"])
def test_a_process_without_the_package_computes_the_same(by_name, exported, strangers):
    results = torch.load(strangers / "results.pt")[REPOSITORY if by_name else str(exported)]
    model, ids = tiny_model(v3_config()), tiny_ids(v3_config())
    assert results["class"].startswith("transformers_modules.")
    assert results["class"].endswith(".modeling_deepseek_moe.DeepseekMoeForCausalLM")
    assert results["experts"] == "grouped_mm"
    with torch.no_grad():
        # The other process may use another number of threads, hence another order of float32 sums.
        torch.testing.assert_close(results["logits"], model(ids).logits, rtol=0, atol=1e-6)
    generated = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(results["generated"], generated)


def test_a_process_without_the_package_saves_the_same_tensors_and_code(exported, strangers):
    tensors, again = (load_file(folder / "model.safetensors") for folder in (exported, strangers / "again"))
    assert tensors.keys() == again.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    for path in exported.glob("*.py"):
        assert (strangers / "again" / path.name).read_bytes() == path.read_bytes()


def test_a_copy_saved_without_code_does_not_point_at_code(exported, tmp_path):
    DeepseekMoeForCausalLM.from_pretrained(exported).save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())


def test_a_copy_saved_without_code_goes_on_pointing_at_a_repositorys_code(exported, tmp_path):
    """As transformers writes it into the config of a model that was loaded by name."""
    model = DeepseekMoeForCausalLM.from_pretrained(exported)
    model.config.auto_map = {name: f"{REPOSITORY}--{code}" for name, code in model.config.auto_map.items()}
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == model.config.auto_map
