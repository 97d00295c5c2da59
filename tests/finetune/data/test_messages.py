"""Messages in the forms that data sets have: content in parts, nulls that Arrow put in, tools as JSON text."""

import json

import pytest
from datasets import Dataset
from tiny import tiny_config, tiny_model
from tiny_run import TEMPLATE, tiny_tokenizer, write_jsonl

from modeling_deepseek_moe.finetune.data.chat import encode
from modeling_deepseek_moe.finetune.data.messages import checked_messages, checked_tools, without_nulls
from modeling_deepseek_moe.finetune.data.preferences import encode_preference
from modeling_deepseek_moe.finetune.data.report import RowError
from modeling_deepseek_moe.finetune.errors import UserError
from modeling_deepseek_moe.finetune.evaluate.answers import questions_of
from modeling_deepseek_moe.finetune.evaluate.conversation import Conversation

USER = {"role": "user", "content": "w1 w2"}
ANSWER = {"role": "assistant", "content": "w3 w4"}


def parts(message):
    """The same, its content in two parts."""
    first, second = message["content"].split()
    texts = [{"type": "text", "text": f"{first} "}, {"type": "text", "text": second}]
    return {**message, "content": texts}


def test_text_parts_are_joined_wherever_a_message_stands(tmp_path):
    tokenizer, talk = tiny_tokenizer(), [parts(USER), parts(ANSWER)]
    plain = encode({"messages": [USER, ANSWER]}, tokenizer, 64)
    assert encode({"messages": talk}, tokenizer, 64) == plain
    other = {"role": "assistant", "content": "w5 w6"}
    preference = {"prompt": [USER], "chosen": [ANSWER], "rejected": [other]}
    in_parts = {key: [parts(message) for message in messages] for key, messages in preference.items()}
    assert encode_preference(in_parts, tokenizer, 64, "cut") == encode_preference(preference, tokenizer, 64, "cut")
    plain_rows = write_jsonl(tmp_path / "plain.jsonl", [{"messages": [USER, ANSWER]}])
    in_part_rows = write_jsonl(tmp_path / "parts.jsonl", [{"messages": talk}])
    assert questions_of(str(in_part_rows), "test", tokenizer, None) == questions_of(
        str(plain_rows), "test", tokenizer, None
    )


def test_a_history_in_parts_is_talked_on_as_text():
    model, tokenizer = tiny_model(tiny_config("v3", pad_token_id=2)), tiny_tokenizer()
    talks = [Conversation(model, tokenizer, max_new_tokens=1, do_sample=False) for _ in range(2)]
    talks[0].messages, talks[1].messages = [USER, ANSWER], [parts(USER), parts(ANSWER)]
    assert talks[0].ask("w7") == talks[1].ask("w7")
    assert talks[0].prompt_tokens == talks[1].prompt_tokens
    talks[1].messages = [{"role": "user", "content": [{"type": "image_url"}]}]
    with pytest.raises(UserError, match="a part of the type 'image_url'"):
        talks[1].ask("w7")


@pytest.mark.parametrize(
    "content, message",
    [
        (
            [{"type": "text", "text": "w1"}, {"type": "image_url", "image_url": {}}],
            "a part of the type 'image_url'; only",
        ),
        ([{"type": "input_audio"}], "a part of the type 'input_audio'"),
        ([{"type": "text"}], "a part without `text`"),
        (["w1"], "a part text; only"),
        ([{"text": "w1"}], "a part an object; only"),
        (42, "here it is a number: 42"),
        ({"answer": "w8"}, 'here it is an object: {"answer": "w8"}'),
        (True, "here it is a truth value: true"),
    ],
    ids=["image", "audio", "no text", "bare text", "no type", "number", "object", "truth"],
)
@pytest.mark.parametrize("role", ["user", "assistant"])
def test_content_that_is_no_text_is_refused_by_its_type(content, message, role):
    talk = [{**one, "content": content} if one["role"] == role else one for one in (USER, ANSWER)]
    with pytest.raises(RowError) as caught:
        encode({"messages": talk}, tiny_tokenizer(), 64)
    assert message in str(caught.value) and caught.value.reason == "content that is no text"


@pytest.mark.parametrize("role", ["system", "user", "tool"])
def test_a_message_without_content_is_not_read_as_empty(role):
    with pytest.raises(RowError, match=f"a message of the role '{role}' has no `content`"):
        encode({"messages": [{"role": role, "content": None}, ANSWER]}, tiny_tokenizer(), 64)


def test_nulls_are_dropped_at_every_depth_but_not_from_lists():
    value = {"a": None, "b": [{"c": None, "d": 0}, None, []], "e": {"f": {"g": None}}, "h": False, "i": ""}
    assert without_nulls(value) == {"b": [{"d": 0}, None, []], "e": {"f": {}}, "h": False, "i": ""}


def test_rows_that_went_through_arrow_are_the_rows_that_went_in():
    """A table gives every row the keys of all rows, also inside arguments and schemas."""

    def row(name, arguments, required):
        schema = {"type": "object", "properties": {key: {"type": "string"} for key in arguments}, "required": required}
        function = {"name": name, "arguments": arguments}
        call = {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}
        return {"messages": [USER, call, ANSWER], "tools": [{"name": name, "parameters": schema}]}

    rows = [row("w1", {"city": "w2"}, ["city"]), row("w3", {"x": "w5", "y": "w6"}, ["x", "y"])]
    table = Dataset.from_list(rows)
    assert "null" in json.dumps(table[0])
    for made, plain in zip(table, rows, strict=True):
        assert checked_messages(made["messages"]) == checked_messages(plain["messages"])
        assert checked_tools(without_nulls(made["tools"])) == plain["tools"]


TOOL = {"name": "w70", "parameters": {"default": None}}


@pytest.mark.parametrize(
    "tools", [json.dumps([TOOL]), [json.dumps(TOOL)], json.dumps(TOOL)], ids=["the list", "each", "only one"]
)
def test_tools_as_json_text_are_read_with_the_nulls_that_they_say(tools):
    assert checked_tools(tools) == [TOOL]
    shows = tiny_tokenizer("{% for t in tools %}{{ t.name }} {% endfor %}" + TEMPLATE)
    ids, _ = encode({"messages": [USER, ANSWER], "tools": tools}, shows, 64)
    assert shows.convert_ids_to_tokens(ids)[0] == "w70"


@pytest.mark.parametrize("tools", [None, [], "[]", "null"])
def test_no_tools_are_no_tools(tools):
    assert checked_tools(tools) is None
    assert encode({"messages": [USER, ANSWER], "tools": tools}, tiny_tokenizer(), 64)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"tools": "[{"}, "`tools` is text but not JSON"),
        ({"tools": [3]}, "`tools` is a list of objects; 3 is none"),
        ({"tools": ["[]"]}, r"`tools` is a list of objects; \[\] is none"),
        ({"tool_calls": "{"}, "`tool_calls` is text but not JSON"),
        ({"tool_calls": {"name": "w1"}}, "`tool_calls` is a list of objects"),
        ({"tool_calls": [{"function": {"arguments": {}}}]}, "a tool call is .*not .*arguments"),
        ({"tool_calls": [{"function": {"name": "w1", "arguments": [1]}}]}, r"`arguments` .* not a list: \[1\]"),
    ],
    ids=["tools", "a number", "a list in it", "calls", "one call", "no name", "arguments"],
)
def test_malformed_tools_and_calls_are_named(row, message):
    answer = {**ANSWER, **{key: row[key] for key in ("tool_calls",) if key in row}}
    with pytest.raises(RowError, match=message):
        encode({"messages": [USER, answer], "tools": row.get("tools")}, tiny_tokenizer(), 64)
