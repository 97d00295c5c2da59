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
import transformers
from safetensors.torch import load_file
from tiny import tiny_ids, tiny_model, v3_config

import modeling_deepseek_moe
from modeling_deepseek_moe import DeepseekMoeConfig, DeepseekMoeForCausalLM
from modeling_deepseek_moe.transformers_names import refuse_other_releases

PACKAGE = Path(modeling_deepseek_moe.__file__).parent
REVISION = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "someone/tiny-deepseek"
INSTALLED = Path(transformers.__file__).parents[1]

# Loads by path and by name, and saves what it computed and what it saves again.
STRANGER = """
import sys
sys.modules["modeling_deepseek_moe"] = None
import torch, transformers
from transformers import AutoModelForCausalLM
ids, results = torch.load(sys.argv[1]), {"transformers": transformers.__version__}
greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
for where in sys.argv[3:]:
    model = AutoModelForCausalLM.from_pretrained(where, trust_remote_code=True)
    results[where] = {
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "experts": model.config._experts_implementation,
        "logits": model(ids).logits.detach(),
        "generated": model.generate(ids, **greedy),
        "static": model.generate(ids, cache_implementation="static", **greedy),
        "drafted": model.generate(ids[:1], use_mtp=True, **greedy),
    }
model.save_pretrained(sys.argv[2] + "/again")
torch.save(results, sys.argv[2] + "/results.pt")
"""

# Loads as under other releases, and prints what the exported code says of each.
OTHERS = """
import sys, transformers
sys.modules["modeling_deepseek_moe"] = None
for transformers.__version__ in sys.argv[2:]:
    try:
        transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
    except ImportError as error:
        print(error)
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


def run_alone(program: str, *arguments, home: Path, release: Path = INSTALLED) -> str:
    """What a program prints that runs with another home and Hub cache, and a folder's transformers."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={**environment, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(release)},
        cwd=home,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def strangers(exported, tmp_path_factory) -> Path:
    """Where a process without the package left its results; its Hub cache holds the folder as a repository."""
    folder = tmp_path_factory.mktemp("stranger")
    repository = folder / "hub" / f"models--{REPOSITORY.replace('/', '--')}"
    shutil.copytree(exported, repository / "snapshots" / REVISION)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    torch.save(tiny_ids(v3_config()), folder / "ids.pt")
    run_alone(STRANGER, folder / "ids.pt", folder, exported, REPOSITORY, home=folder)
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
    check_generated(results, model, ids)


def check_generated(results: dict, model: DeepseekMoeForCausalLM, ids: torch.Tensor) -> None:
    expected = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, use_cache=False)
    assert torch.equal(results["generated"], expected)
    assert torch.equal(results["static"], expected)
    assert torch.equal(results["drafted"], model.generate(ids[:1], max_new_tokens=8, do_sample=False, pad_token_id=0))


def test_other_releases_of_transformers_load_the_export_and_generate_the_same(exported, request, tmp_path):
    releases = request.config.getoption("--transformers-folder")
    if not releases:
        pytest.skip("no folder with another release of transformers was given (--transformers-folder)")
    model, ids = tiny_model(v3_config()), tiny_ids(v3_config())
    torch.save(ids, tmp_path / "ids.pt")
    for release in releases:
        home = tmp_path / Path(release).name
        home.mkdir()
        run_alone(STRANGER, tmp_path / "ids.pt", home, exported, home=home, release=Path(release).absolute())
        results = torch.load(home / "results.pt")
        (own,) = Path(release).glob("transformers-*.dist-info")
        assert own.name == f"transformers-{results['transformers']}.dist-info"
        with torch.no_grad():
            # Releases may sum in another order.
            torch.testing.assert_close(results[str(exported)]["logits"], model(ids).logits, rtol=0, atol=2e-5)
        check_generated(results[str(exported)], model, ids)


def test_the_exported_code_refuses_releases_that_it_was_not_tried_with(exported, tmp_path):
    releases = ["5.19.2", "5.25.0", "6.0.0.dev0"]
    said = run_alone(OTHERS, exported, *releases, home=tmp_path).splitlines()
    for release, line in zip(releases, said, strict=True):
        assert line.startswith(f"this model's code was tried with transformers 5.20 to 5.24, not with {release}: ")
        assert "pip install 'transformers>=5.20,<5.25'" in line


def test_the_package_itself_leaves_that_to_its_requirements():
    refuse_other_releases("5.25.0", "modeling_deepseek_moe.transformers_names")
    for release in ("5.20.0", "5.24.1"):
        refuse_other_releases(release, "transformers_modules.someone.transformers_names")


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
