"""Whatever a row or a file of rows holds, it is one bad row with its reason and place, or one line."""

import json

import pytest
from bad_rows import BAD_FILES, BAD_LINES
from tiny_run import tiny_tokenizer

from modeling_deepseek_moe.finetune.data.rows import load_data, reading_of
from modeling_deepseek_moe.finetune.errors import UserError
from modeling_deepseek_moe.finetune.recipe.load import make_recipe

GOOD = b'{"prompt": "w1", "completion": "w2"}'


def load(path, tmp_path, **rules):
    return load_data(str(path), "train", tiny_tokenizer(), 64, tmp_path / "cache", **rules)


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_one_bad_row(tmp_path, name):
    line, reason = BAD_LINES[name]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([GOOD, line, GOOD]))
    with pytest.raises(UserError) as caught:
        load(path, tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{path}, line 2: ") and message.endswith("(`bad_rows: skip` goes on without)")
    assert message.isprintable() and len(message) < 600
    message.encode()  # of a surrogate, too, something that can be printed
    assert len(load(path, tmp_path, bad_rows="skip")) == 2
    (report,) = (tmp_path / "cache").glob("*.json")
    assert {name: entry["rows"] for name, entry in json.loads(report.read_text())["left_out"].items()} == {reason: 1}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, name):
    content, message = BAD_FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load(path, tmp_path, bad_rows="skip")
    assert message in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_bad_items_of_an_array_are_bad_rows_and_those_behind_them_are_read(tmp_path):
    # Of an array these three are its end, no text at all, and a comma too many.
    items = [BAD_LINES[name][0] for name in BAD_LINES if name not in ("cut off", "not UTF-8", "a comma behind")]
    path = tmp_path / "rows.json"
    path.write_bytes(b"[\n" + b",\n".join(sum(([GOOD, line] for line in items), [])) + b",\n" + GOOD + b"]")
    tokens = load(path, tmp_path, bad_rows="skip")
    assert len(tokens) == len(items) + 1
    with pytest.raises(UserError, match=r"rows.json, item 2 \(line 3\): not JSON \(Expecting value"):
        load(path, tmp_path)


@pytest.mark.parametrize("end", [b"", b",", b"] 3"], ids=["cut off", "cut behind a comma", "more"])
def test_an_array_that_does_not_end_well_is_said_behind_its_rows(tmp_path, end):
    path = tmp_path / "rows.json"
    path.write_bytes(b"[" + GOOD + b", " + GOOD + end)
    with pytest.raises(UserError, match=r"rows.json, (item 3|behind item 2).*: not JSON"):
        load(path, tmp_path)
    assert len(load(path, tmp_path, bad_rows="skip")) == 2


def test_rows_of_two_kinds_in_one_file_are_said(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([GOOD, GOOD, b'{"text": "w1"}']))
    load(path, tmp_path)
    assert capsys.readouterr().out == f"Rows of {path}: read as 2 prompt and completion, 1 text\n"


def test_a_key_of_the_recipe_reaches_the_rows():
    recipe = {"model": "m", "data": "d", "output_dir": "o"}
    assert reading_of(make_recipe(recipe), tiny_tokenizer()).split_special_tokens
    changed = reading_of(make_recipe({**recipe, "split_special_tokens": False}), tiny_tokenizer())
    assert not changed.split_special_tokens
    assert changed.digest("") != reading_of(make_recipe(recipe), tiny_tokenizer()).digest("")
