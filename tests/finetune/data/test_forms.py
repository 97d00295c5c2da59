"""Rows of other data sets: Alpaca's, ShareGPT's, OpenAI's content in parts."""

import json

import pytest
from tiny_run import TEMPLATE, tiny_tokenizer, write_jsonl

from modeling_deepseek_moe.finetune.data.chat import IGNORED, encode
from modeling_deepseek_moe.finetune.data.forms import known_form
from modeling_deepseek_moe.finetune.data.preferences import encode_preference
from modeling_deepseek_moe.finetune.data.rows import load_data

CALLS = TEMPLATE.replace(
    "<bot> {{ m.content }}",
    "<bot> {{ m.content }}{% for c in m.tool_calls or [] %} w60 {{ c.name }}"
    "{% for v in c.arguments.values() %} {{ v }}{% endfor %}{% endfor %}",
)
FORMS = {
    "Alpaca": (
        {"instruction": "w1", "input": "w2", "output": "w3", "text": "w70 w71"},
        "Alpaca instructions",
        "<s> <user> w1 w2 <bot> w3 </s>",
        "w3 </s>",
    ),
    "Alpaca without input": (
        {"instruction": "w1", "input": "", "output": "w3"},
        "Alpaca instructions",
        "<s> <user> w1 <bot> w3 </s>",
        "w3 </s>",
    ),
    "Alpaca with a past": (
        {"instruction": "w1", "output": "w3", "system": "w9", "history": [["w4", "w5"]]},
        "Alpaca instructions",
        "<s> <user> w9 <user> w4 <bot> w5 </s> <user> w1 <bot> w3 </s>",
        "w5 </s> w3 </s>",
    ),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "w1"}, {"from": "gpt", "value": "w2"}], "id": "x"},
        "ShareGPT conversations",
        "<s> <user> w1 <bot> w2 </s>",
        "w2 </s>",
    ),
    "ShareGPT with a system": (
        {"system": "w9", "conversations": [{"from": "user", "value": "w1"}, {"from": "assistant", "value": "w2"}]},
        "ShareGPT conversations",
        "<s> <user> w9 <user> w1 <bot> w2 </s>",
        "w2 </s>",
    ),
    "ShareGPT with weights": (
        {
            "conversations": [
                {"from": "human", "value": "w1"},
                {"from": "gpt", "value": "w2", "weight": 0},
                {"from": "human", "value": "w3"},
                {"from": "gpt", "value": "w4", "weight": 1},
            ]
        },
        "ShareGPT conversations",
        "<s> <user> w1 <bot> w2 </s> <user> w3 <bot> w4 </s>",
        "w4 </s>",
    ),
    "ShareGPT in messages": (
        {"messages": [{"from": "human", "value": "w1"}, {"from": "gpt", "value": "w2"}]},
        "ShareGPT conversations",
        "<s> <user> w1 <bot> w2 </s>",
        "w2 </s>",
    ),
    "ShareGPT with a call": (
        {
            "conversations": [
                {"from": "human", "value": "w1"},
                {"from": "function_call", "value": json.dumps({"name": "w7", "arguments": {"a": "w8"}})},
                {"from": "observation", "value": "w3"},
                {"from": "gpt", "value": "w2"},
            ]
        },
        "ShareGPT conversations",
        "<s> <user> w1 <bot> w60 w7 w8 </s> <user> w3 <bot> w2 </s>",
        "w60 w7 w8 </s> w2 </s>",
    ),
    "conversations of OpenAI": (
        {"conversations": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]},
        "ShareGPT conversations",
        "<s> <user> w1 <bot> w2 </s>",
        "w2 </s>",
    ),
    "content in parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "w1 "}, {"type": "text", "text": "w2"}]},
                {"role": "assistant", "content": "w3"},
            ]
        },
        "messages with content in parts",
        "<s> <user> w1 w2 <bot> w3 </s>",
        "w3 </s>",
    ),
    "prompt before Alpaca": (
        {"prompt": "w1", "completion": " w2", "instruction": "w5", "output": "w6"},
        "prompt and completion",
        "<s> w1 w2 </s>",
        "w2 </s>",
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_row_of_another_form_is_read_and_named(tmp_path, capsys, name):
    row, kind, tokens, learned = FORMS[name]
    tokenizer = tiny_tokenizer(CALLS)
    ids, labels = encode(row, tokenizer, 64)
    assert " ".join(tokenizer.convert_ids_to_tokens(ids)) == tokens
    assert " ".join(tokenizer.convert_ids_to_tokens([label for label in labels if label != IGNORED])) == learned
    path = write_jsonl(tmp_path / "rows.jsonl", [row, row])
    load_data(str(path), "train", tokenizer, 64, tmp_path / "cache")
    said = "" if kind == "prompt and completion" else f"Rows of {path}: read as {kind}\n"
    assert capsys.readouterr().out == said
    (report,) = (tmp_path / "cache").glob("*.json")
    assert json.loads(report.read_text())["kinds"] == {kind: 2}


def test_a_row_of_ours_stays_as_it_is_and_a_form_becomes_one_of_ours():
    for row in ({"text": "a"}, {"prompt": "a", "completion": "b"}, {"messages": []}, {"chosen": "a"}, {}):
        assert known_form(row)[0] is row
    for row, *_ in FORMS.values():
        once = known_form(row)[0]
        assert known_form(once)[0] == once


@pytest.mark.parametrize(
    "row",
    [
        {
            "conversations": [{"from": "human", "value": "w1"}],
            "chosen": {"from": "gpt", "value": "w2"},
            "rejected": {"from": "gpt", "value": "w3"},
        },
        {"instruction": "w1", "input": "", "chosen": "w2", "rejected": "w3"},
    ],
    ids=["ShareGPT", "Alpaca"],
)
def test_preferences_have_these_forms_too(row):
    tokenizer = tiny_tokenizer()
    (made,), _ = encode_preference(row, tokenizer, 64, "cut")
    words = [" ".join(tokenizer.convert_ids_to_tokens(ids)) for ids in made.values()]
    assert words == ["<s> <user> w1 <bot>", "w2 </s>", "w3 </s>"]
