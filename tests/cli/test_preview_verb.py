"""`deepseek-moe preview`: what is learned of the first rows, in colour or in brackets."""

import json
import os
import re

import pytest
from tiny_run import counting_rows, tiny_tokenizer, write_jsonl
from typer.testing import CliRunner

from modeling_deepseek_moe.cli.main import app

LEARNED, READ, CONTROL = "\x1b[32m", "\x1b[90m", "\x1b[7;32m"


@pytest.fixture
def model(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def preview(*arguments, **environment):
    unset = dict.fromkeys(("NO_COLOR", "FORCE_COLOR", "COLORTERM", "TTY_COMPATIBLE"))
    return CliRunner().invoke(
        app, ["preview", *map(str, arguments)], env={**unset, "COLUMNS": "200", "TERM": "xterm", **environment}
    )


def test_three_rows_are_shown_with_what_is_learned_and_all_are_counted(tmp_path, model):
    rows = [{"conversations": [{"from": "human", "value": "w1"}, {"from": "gpt", "value": "w2"}]}, {"txt": "w1"}]
    path = write_jsonl(tmp_path / "rows.jsonl", [*rows, *counting_rows("text", 10)])
    result = preview(path, model, "max_length=4")
    assert result.exit_code == 0, result.output
    shown = result.stdout.split("\n\n")
    assert shown[0].startswith("line 3: text, 4 tokens, 3 of them learned, cut to max_length\n{<s>}[[ w0")
    assert "[[learned]], read, {control token}" in result.stdout
    assert (
        "all 12 rows: 10 used, 40 tokens, 30 of them learned; 4 to 4 tokens a row, median 4, max_length 4"
        in result.stdout
    )
    assert "left out: of no known kind" in result.stdout and "line 2" in result.stdout
    assert "a run stops at a row that cannot be read: `bad_rows: skip` goes on" in result.stdout
    assert len(re.findall(r"(?m)^line \d+:", result.stdout)) == 3


def test_brackets_stand_for_colours_where_there_are_none(tmp_path, model):
    talk = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}] * 2
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": talk}])
    for environment in ({}, {"FORCE_COLOR": "1", "NO_COLOR": "1"}, {"FORCE_COLOR": "1", "TERM": "dumb"}):
        text = preview(path, model, **environment).stdout
        assert "{<s>} <user> w1 <bot>[[ w2 {</s>}]] <user> w1 <bot>[[ w2 {</s>}]]" in text
        assert LEARNED not in text and "\x1b[9" not in text
    text = preview(path, model, FORCE_COLOR="1").stdout
    assert f"{READ} <user> w1 <bot>\x1b[0m{LEARNED} w2\x1b[0m{CONTROL} </s>" in text and "[[" not in text


def test_a_recipe_is_previewed_with_its_own_keys(tmp_path, model):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "w1 </s> w2"}, {"text": "w3"}])
    recipe = tmp_path / "recipe.yaml"
    values = {"model": str(model), "data": str(path), "output_dir": str(tmp_path / "run"), "max_length": 8}
    recipe.write_text(json.dumps({**values, "split_special_tokens": False}))
    shown = preview(recipe, "--rows", 1).stdout
    assert "{<s>}[[ w1 {</s>} w2 {</s>}]]" in shown and "line 2" not in shown
    assert "{<s>}[[ w1 {<unk>} w2 {</s>}]]" in preview(recipe, "split_special_tokens=true").stdout
    assert not (tmp_path / "run").exists()


def test_both_answers_of_a_preference_are_shown(tmp_path, model):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "w1", "chosen": "w2", "rejected": "w3"}])
    shown = preview(path, model, "dpo.beta=0.1").stdout
    assert shown.startswith("line 1: preferences, 6 tokens, 4 of them learned\n")
    assert "chosen: [[w2 {</s>}]]\nrejected: [[w3 {</s>}]]\n" in shown


def test_what_would_steer_the_terminal_is_spelled_and_long_passages_are_shortened(tmp_path, model):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["\x1b[31m", "\u202e"])
    tokenizer.save_pretrained(model)
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "w1 \x1b[31m \u202e " + "w2 " * 500}])
    shown = preview(path, model).stdout
    assert "\x1b[31m" not in shown and "\\x1b[31m" in shown and "\\u202e" in shown
    assert re.search(r"w2 \.\.\. [\d,]+ characters \(--full\) \.\.\. ", shown) and shown.count("w2") < 300
    assert preview(path, model, "--full").stdout.count("w2") == 500


def test_a_part_of_the_rows_is_counted_and_that_is_said(tmp_path, model):
    path = write_jsonl(tmp_path / "rows.jsonl", counting_rows("text", 1200))
    assert "the first 1,000 rows: 1,000 used" in preview(path, model).stdout
    assert "the first 10 rows: 10 used" in preview(path, model, "--limit", 10).stdout
    assert "all 1,200 rows: 1,200 used" in preview(path, model, "--limit", 0).stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["{rows}", "{folder}/none"], "cannot load model"),
        (
            ["{folder}/none.jsonl", "{model}"],
            "does not exist: give the path of a file (JSONL, a JSON array, CSV, Parquet)",
        ),
        (["{empty}", "{model}"], "has no rows"),
        (["{bad}", "{model}"], "has no rows to learn from"),
        (["{rows}", "{model}", "max_lenght=3"], "did you mean `max_length`?"),
        (["{rows}", "{model}", "max_length"], "'max_length' is not of the form key=value"),
        (["{rows}", "{model}", "max_length=1"], "a row needs at least 2 tokens"),
        (["lora_all"], "the recipe lacks `"),
        (["none"], "cannot read recipe none"),
    ],
    ids=["model", "data", "empty", "bad", "key", "no value", "value", "half a recipe", "no recipe"],
)
def test_what_cannot_be_previewed_is_one_line(tmp_path, model, arguments, message):
    names = {"folder": tmp_path, "model": model}
    for name, rows in (("rows", [{"text": "w1"}]), ("empty", []), ("bad", [{"txt": "w1"}])):
        names[name] = write_jsonl(tmp_path / f"{name}.jsonl", rows)
    result = preview(*(argument.format(**names) for argument in arguments))
    assert result.exit_code == 1 and message in result.stderr and result.stderr.count("\n") == 1


def test_a_tilde_is_the_home_in_arguments_and_in_every_key_of_a_recipe(tmp_path, model):
    write_jsonl(tmp_path / "rows.jsonl", [{"text": "w1"}])
    home = {"HOME": os.fspath(tmp_path)}
    for arguments in (["~/rows.jsonl", "~/model"], ["~/recipe.yaml"], ["~/recipe.yaml", "data=~/rows.jsonl"]):
        (tmp_path / "recipe.yaml").write_text("model: ~/model\ndata: ~/rows.jsonl\noutput_dir: ~/run\n")
        result = preview(*arguments, **home)
        assert result.exit_code == 0 and "[[ w1 {</s>}]]" in result.stdout, result.output
