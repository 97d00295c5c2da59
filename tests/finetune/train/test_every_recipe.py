"""Every shipped recipe, from YAML to a pushed model that is loaded back by its name."""

import json
import subprocess
import sys

import pytest
from places import SUPPORT

from modeling_deepseek_moe.finetune.demo.local_hub import LocalHub
from modeling_deepseek_moe.finetune.recipe.load import SHIPPED

PROGRAM = SUPPORT / "every_recipe.py"
WHOLE_MODELS = {"full", "continue_pretraining"}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    with LocalHub(folder / "hub", lfs=True) as hub:
        done = subprocess.run(
            [sys.executable, str(PROGRAM), str(folder), str(folder / "report.json")],
            env={**hub.environment(folder / "home"), "HF_TOKEN": "hf_private", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=600,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "hf_private" not in done.stdout + done.stderr
    return json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize("name", SHIPPED)
def test_a_recipe_runs_from_yaml_to_a_model_loaded_by_name(report, name):
    run = report[name]
    assert run["summary"]["steps"] == 3
    assert run["summary"]["hub"].endswith(f"/me/{name.replace('_', '-')}")
    # The same weights: a merged or dequantised form may add up in another order.
    assert run["difference"] < 1e-4 < run["moved"]
    whole = name in WHOLE_MODELS
    assert ({"config.json", "model.safetensors"} <= set(run["files"])) == whole
    assert {"README.md", "tokenizer.json"} <= set(run["files"])
    if name.startswith(("lora", "qlora", "dpo")):
        assert {"adapter_config.json", "adapter_model.safetensors"} <= set(run["files"])
    if name.startswith("esft"):
        assert {"expert_cfg.json", "model.safetensors"} <= set(run["files"])
    assert not [file for file in run["files"] if file.endswith((".bin", ".pt", ".pkl", "training_args.bin"))]
