"""Commands replace what an earlier call of theirs wrote, and no other file: not even their own input."""

import json

import pytest
from tiny_run import counting_rows, tiny_base, write_jsonl
from typer.testing import CliRunner

from modeling_deepseek_moe.cli.main import app
from modeling_deepseek_moe.finetune.demo import one_demo
from modeling_deepseek_moe.finetune.errors import UserError

SCORES = {"token_scores": {"1": {"0": 0.25, "1": 0.75}}, "gate_scores": {"1": {"0": 0.1, "1": 0.2}}}
CHOICE = {"experts": {"1": [1]}, "shared_experts": False, "non_expert_modules": False}


def run(*arguments: object):
    return CliRunner().invoke(app, list(map(str, arguments)))


def refused(done, path) -> None:
    assert done.exit_code == 1
    assert f"{path} is there already and is no result of this command, so it is not replaced" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.fixture
def files(tmp_path):
    """A folder with what people have in one."""
    (tmp_path / "scores.json").write_text(json.dumps(SCORES))
    (tmp_path / "expert_cfg.json").write_text(json.dumps(CHOICE))
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "settings.json").write_text('{"experts": "all of them"}')
    (tmp_path / "empty.json").write_text("")
    write_jsonl(tmp_path / "rows.jsonl", counting_rows("text"))
    return tmp_path


@pytest.mark.parametrize("name", ["rows.jsonl", "thesis.tex", "settings.json", "expert_cfg.json", "empty.json"])
def test_scores_replace_nothing_but_scores(files, name):
    before = (files / name).read_bytes()
    refused(run("esft", "score", "model", files / "rows.jsonl", "--output", files / name), files / name)
    assert (files / name).read_bytes() == before


@pytest.mark.parametrize("name", ["scores.json", "thesis.tex", "settings.json", "rows.jsonl", "empty.json"])
def test_a_choice_replaces_nothing_but_a_choice(files, name):
    before = (files / name).read_bytes()
    refused(run("esft", "select", files / "scores.json", "--output", files / name), files / name)
    assert (files / name).read_bytes() == before


@pytest.mark.parametrize("neighbour", ["recipe.yaml", "model.safetensors"], ids=["of a run", "of an adapter"])
def test_a_choice_that_belongs_to_weights_is_not_replaced(files, neighbour):
    (files / neighbour).write_text("")
    refused(run("esft", "select", files / "scores.json", "--output", files / "expert_cfg.json"), "expert_cfg.json")
    assert json.loads((files / "expert_cfg.json").read_text()) == CHOICE


def test_an_earlier_choice_is_replaced(files):
    done = run("esft", "select", files / "scores.json", "--output", files / "expert_cfg.json", "--top-p", 1)
    assert done.exit_code == 0, done.output
    assert json.loads((files / "expert_cfg.json").read_text())["experts"] == {"1": [1, 0]}


@pytest.mark.parametrize("name", ["experts.json", "experts.png"])
def test_the_report_on_experts_replaces_nothing_but_a_report(files, name):
    """A run leaves files of the same names."""
    (files / "run").mkdir()
    (files / "run" / name).write_text('{"layers": [1, 2], "tokens": [[1]], "history": []}')
    before = (files / "run" / name).read_bytes()
    refused(run("experts", "model", files / "rows.jsonl", "--output", files / "run"), files / "run" / name)
    assert [path.name for path in (files / "run").iterdir()] == [name]
    assert (files / "run" / name).read_bytes() == before


def test_an_earlier_report_and_earlier_scores_are_replaced(files):
    base = tiny_base(files / "base")
    for _ in range(2):
        for arguments in (("experts",), ("esft", "score")):
            output = files / ("report" if arguments == ("experts",) else "scores.json")
            done = run(*arguments, base, files / "rows.jsonl", "--output", output)
            assert done.exit_code == 0, done.output
    assert json.loads((files / "scores.json").read_text()) != SCORES
    assert sorted(path.name for path in (files / "report").iterdir()) == ["experts.json", "experts.png"]


@pytest.mark.parametrize("name", ["evaluation.json", "answers.jsonl"])
def test_an_evaluation_replaces_nothing_but_an_evaluation(files, name):
    write_jsonl(files / name, counting_rows("prompt"))
    before = (files / name).read_bytes()
    data = files / "answers.jsonl" if name == "answers.jsonl" else files / "rows.jsonl"
    refused(run("evaluate", "model", "--data", data, "--output", files), files / name)
    assert (files / name).read_bytes() == before


def test_the_demo_does_not_write_over_rows_of_others(files, monkeypatch):
    monkeypatch.setattr(one_demo, "TRAIN_ITEMS", 8)
    write_jsonl(files / "train.jsonl", counting_rows("text"))
    before = (files / "train.jsonl").read_bytes()
    with pytest.raises(UserError, match="train.jsonl is there already and is no result of this command"):
        one_demo.run_demo(files)
    assert (files / "train.jsonl").read_bytes() == before
