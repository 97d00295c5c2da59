"""ESFT where paths are relative or lead through a folder that is a link."""

import json
import os

import pytest
from tiny_run import stopped_at, tiny_base, tiny_values
from typer.testing import CliRunner

from modeling_deepseek_moe import CheckpointError
from modeling_deepseek_moe.cli.main import app
from modeling_deepseek_moe.conversion.adapters.esft import open_esft, read_expert_cfg
from modeling_deepseek_moe.finetune.recipe.load import make_recipe
from modeling_deepseek_moe.finetune.train import one_run as train


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder, with a base and rows, and `linked`, a link to it."""
    tiny_base(tmp_path / "here" / "base")
    (tmp_path / "linked").symlink_to(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.mark.parametrize("output_dir", ["run", "./run", "../here/run", "../linked/run"])
def test_a_run_goes_on_in_it(here, output_dir):
    values = {**tiny_values(here, here / "base"), "esft.top_p": 0.4, "output_dir": output_dir}
    recipe = make_recipe({key: value for key, value in values.items() if not key.startswith("lora")})
    with stopped_at(3, "checkpoint-2 is saved"):
        train.run(recipe)
    summary = train.run(recipe)
    assert summary["resumed_from"] == "checkpoint-2"
    os.remove("run/summary.json")
    assert train.run(recipe)["steps"] == summary["steps"]


def test_the_documented_commands_take_files_by_their_bare_names(here):
    values = tiny_values(here, "base", **{"esft.experts": "expert_cfg.json", "output_dir": "run"})
    rest = [f"{key}={json.dumps(value)}" for key, value in values.items() if not key.startswith("lora")]
    for arguments in (
        ["esft", "score", "base", "rows.jsonl", "--output", "scores.json", "--sample-tokens", "60"],
        ["esft", "select", "scores.json", "--output", "expert_cfg.json", "--top-p", "0.4"],
        *2 * [["finetune", "esft_token", *rest, "dtype=float32", "training.bf16=false"]],
    ):
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, f"{arguments}: {done.output}"
    assert (here / "run" / "adapter" / "expert_cfg.json").is_file()


def test_a_link_out_of_the_folder_is_refused_all_the_same(here, tmp_path):
    (tmp_path / "elsewhere.json").write_text('{"experts": {"1": [0]}}')
    (here / "expert_cfg.json").symlink_to(tmp_path / "elsewhere.json")
    for path in ("expert_cfg.json", here / "expert_cfg.json", tmp_path / "linked" / "expert_cfg.json"):
        with pytest.raises(CheckpointError, match="is a link out of its folder"):
            read_expert_cfg(path)
    with pytest.raises(CheckpointError, match="is a link out of its folder"):
        open_esft(".")
