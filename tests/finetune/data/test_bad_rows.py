"""Rows that cannot be learned from: counted, named by line, and left out or fatal."""

import json

import pytest
from tiny_run import TEMPLATE, counting_rows, stopped_at, tiny_base, tiny_tokenizer, tiny_values, write_jsonl

from modeling_deepseek_moe.finetune.data.chat import IGNORED, encode
from modeling_deepseek_moe.finetune.data.report import RowError
from modeling_deepseek_moe.finetune.data.rows import load_data, recipe_rows
from modeling_deepseek_moe.finetune.errors import UserError
from modeling_deepseek_moe.finetune.recipe.load import make_recipe
from modeling_deepseek_moe.finetune.train import one_run as train

USER = {"role": "user", "content": "w1 w2"}
ANSWER = {"role": "assistant", "content": "w3 w4"}
GOOD = {"prompt": "w1", "completion": "w2"}
BAD = {
    "not JSON": "{cut off",
    "no JSON object": "3",
    "of no known kind": json.dumps({"txt": "w1"}),
    "messages without roles": json.dumps({"messages": [{"content": "w1"}, ANSWER]}),
    "malformed messages": json.dumps({"messages": [USER, {**ANSWER, "weight": 0.5}]}),
    "empty": json.dumps({"text": " "}),
    "empty messages": json.dumps({"messages": []}),
    "empty answer": json.dumps({"messages": [USER, {**ANSWER, "content": ""}]}),
    "no answer": json.dumps({"messages": [USER]}),
    "unknown role": json.dumps({"messages": [{"role": "usr", "content": "w9"}, USER, ANSWER]}),
    "refused by the template": json.dumps({"messages": [{**USER, "name": "Ann"}, ANSWER]}),
    "content that is no text": json.dumps({"messages": [USER, {"role": "assistant", "content": {"a": 1}}]}),
    "nothing to learn": json.dumps({"messages": [USER, {**ANSWER, "mask": 1}]}),
}
# A template that knows three roles and no names.
STRICT = (
    "{{ bos_token }}{% for m in messages %}{% if m.name %}{{ raise_exception('no names') }}{% endif %}"
    "{% if m.role == 'assistant' %}{{ ' <bot> ' + m.content }} {{ eos_token }}"
    "{% elif m.role in ('user', 'system') %}{{ ' <user> ' + m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %} <bot>{% endif %}"
)


def rows_of(tmp_path, lines, **overrides):
    """Rows of a recipe, and its report."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    values = {"model": "m", "data": str(path), "output_dir": str(tmp_path / "run"), "eval_fraction": 0, **overrides}
    (tmp_path / "run").mkdir(exist_ok=True)
    rows = recipe_rows(make_recipe({"max_length": 64, **values}), tiny_tokenizer(STRICT), tmp_path / "run")
    return rows.train, json.loads((tmp_path / "run" / "data_report.json").read_text())


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_ends_the_reading_unless_told_otherwise(tmp_path, name):
    with pytest.raises(UserError) as caught:
        rows_of(tmp_path, [json.dumps(GOOD), "", BAD[name]])
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'rows.jsonl'}, line 3: ")
    assert message.endswith("(`bad_rows: skip` goes on without)") and "\n" not in message


def test_skipped_rows_are_counted_by_reason_and_shown_by_line(tmp_path, capsys):
    lines = [json.dumps(GOOD), *BAD.values(), json.dumps(GOOD), *["no JSON either"] * 6]
    for _ in ("read", "from the cache"):
        data, report = rows_of(tmp_path, lines, bad_rows="skip")
        assert len(data) == 2
        found = report["data"]
        assert (found["read"], found["kept"], found["complete"]) == (len(lines), 2, True)
        counts = {reason: entry["rows"] for reason, entry in found["left_out"].items()}
        assert counts == {
            "not JSON": 7,
            "no JSON object": 1,
            "of no known kind": 1,
            "malformed messages": 2,
            "empty": 3,
            "no answer": 1,
            "unknown role": 1,
            "refused by the template": 1,
            "content that is no text": 1,
            "nothing to learn": 1,
        }
        entry = found["left_out"]["not JSON"]
        assert entry["first"] == ["line 2", "line 16", "line 17", "line 18", "line 19"]
        assert entry["message"].startswith("not JSON (")
        table = " ".join(capsys.readouterr().out.split())
        assert "2 of 21 used" in table and "left out: unknown role" in table and "line 11" in table


def test_rows_that_are_all_good_show_no_table(tmp_path, capsys):
    _, report = rows_of(tmp_path, [json.dumps(GOOD)] * 3)
    assert capsys.readouterr().out == ""
    # <s> w1 w2 </s>, of which the last two are learned.
    assert (report["data"]["tokens"], report["data"]["learned_tokens"]) == (12, 6)
    assert (report["train_rows"], report["packed_into"], report["eval_rows"]) == (3, None, 0)


@pytest.mark.parametrize(
    "long_rows, kept",
    [
        ("cut", ["<s> w1", "<s> w1 w2 w3"]),
        ("skip", ["<s> w1"]),
        ("split", ["<s> w1", "<s> w1 w2 w3", "w3 w4 w5 w6", "w6 w7 </s>"]),
    ],
)
def test_a_row_longer_than_the_context_is_cut_skipped_or_split(tmp_path, long_rows, kept):
    lines = [json.dumps({"text": text}) for text in ("w1", "w1 w2 w3 w4 w5 w6 w7")]
    data, report = rows_of(tmp_path, lines, long_rows=long_rows, max_length=4)
    tokenizer = tiny_tokenizer()
    words = [" ".join(tokenizer.convert_ids_to_tokens(ids)) for ids in data["input_ids"]]
    assert [text.removesuffix(" </s>") if text == "<s> w1 </s>" else text for text in words] == kept
    left_out = {reason: entry["first"] for reason, entry in report["data"]["left_out"].items()}
    assert left_out == ({"longer than max_length": ["line 2"]} if long_rows == "skip" else {})
    assert (report["data"]["cut"], report["data"]["split"]) == (long_rows == "cut", long_rows == "split")


def test_a_split_text_learns_every_token_once(tmp_path):
    text = " ".join(f"w{i}" for i in range(33))
    data, _ = rows_of(tmp_path, [json.dumps({"text": text})], long_rows="split", max_length=5)
    learned = [label for labels in data["labels"] for label in labels if label != IGNORED]
    assert learned == encode({"text": text}, tiny_tokenizer(), 64)[0][1:]
    assert all(
        len(ids) <= 5 and labels[0] == IGNORED for ids, labels in zip(data["input_ids"], data["labels"], strict=True)
    )


def test_a_long_row_can_end_the_reading(tmp_path):
    with pytest.raises(UserError, match="line 1: the row has more tokens than max_length=3; `long_rows: cut`"):
        rows_of(tmp_path, [json.dumps(GOOD)], long_rows="stop", max_length=3, bad_rows="skip")


def test_a_row_whose_prompt_fills_the_length_is_left_out(tmp_path, capsys):
    rows = [{"prompt": "w1 w2 w3 w4", "completion": "w5"}, {"text": "w1"}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert len(load_data(str(path), "train", tiny_tokenizer(), 4, tmp_path / "cache")) == 1
    table = " ".join(capsys.readouterr().out.split())
    assert "1 of 2 used" in table and "line 1" in table and "max_length=4" in table


def test_a_turn_with_mask_1_or_weight_0_is_context_and_not_learned():
    tokenizer = tiny_tokenizer()
    again = [USER, {**ANSWER, "content": "w5"}]
    whole, labels = encode({"messages": [USER, ANSWER, *again]}, tokenizer, 64)
    for dropped in ({"mask": 1}, {"weight": 0}, {"weight": 0.0}, {"mask": True}):
        ids, labels = encode({"messages": [USER, {**ANSWER, **dropped}, *again]}, tokenizer, 64)
        assert ids == whole
        assert tokenizer.convert_ids_to_tokens([label for label in labels if label != IGNORED]) == ["w5", "</s>"]
    kept = encode({"messages": [USER, {**ANSWER, "mask": 0, "weight": 1}, *again]}, tokenizer, 64)
    assert kept == encode({"messages": [USER, ANSWER, *again]}, tokenizer, 64)


def test_a_role_that_the_template_writes_is_no_unknown_role():
    row = {"messages": [USER, {"role": "tool", "content": "w8"}, ANSWER]}
    assert encode(row, tiny_tokenizer(TEMPLATE), 64)
    with pytest.raises(RowError, match="ignores messages of the role 'tool'"):
        encode(row, tiny_tokenizer(STRICT), 64)


def test_a_run_reports_its_rows_in_its_folder_and_keeps_the_report_when_resumed(tmp_path):
    values = tiny_values(tmp_path, tiny_base(tmp_path / "base"), bad_rows="skip")
    rows = [*counting_rows("prompt"), {"prompt": "w1"}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    with stopped_at(3):
        train.run(make_recipe(values))
    report = json.loads((tmp_path / "run" / "data_report.json").read_text())
    summary = train.run(make_recipe(values))
    assert summary["resumed_from"] == "checkpoint-2"
    assert json.loads((tmp_path / "run" / "data_report.json").read_text()) == report
    assert report["data"]["left_out"]["of no known kind"]["first"] == ["line 25"]
    assert (summary["train_rows"], summary["eval_rows"]) == (report["train_rows"], report["eval_rows"]) == (18, 6)
