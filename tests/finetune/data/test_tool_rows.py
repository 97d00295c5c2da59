"""What a chat template does not show of a row is refused by name; tool calls come in the form that it shows."""

import json

import pytest
from tiny_run import TEMPLATE, tiny_tokenizer

from modeling_deepseek_moe.finetune.data import chat, templates
from modeling_deepseek_moe.finetune.data.chat import IGNORED, encode
from modeling_deepseek_moe.finetune.data.preferences import encode_preference
from modeling_deepseek_moe.finetune.data.report import RowError
from modeling_deepseek_moe.finetune.data.words import Words

USER = {"role": "user", "content": "w1"}
ANSWER = {"role": "assistant", "content": "w4"}
RESULT = {"role": "tool", "content": "w3"}
TOOLS = [{"type": "function", "function": {"name": "w70", "parameters": {}}}]
# As DeepSeek-V3's and R1's first releases: a call is an answer whose content is null.
BY_NULL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'assistant' and m['content'] is none %} <bot>{% for c in m['tool_calls'] %}"
    "{{ ' w60 ' + c['function']['name'] + ' ' + c['function']['arguments'] }}{% endfor %} {{ eos_token }}"
    "{% elif m['role'] == 'assistant' %}{{ ' <bot> ' + m['content'] + ' ' + eos_token }}"
    "{% else %}{{ ' <user> ' + m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %} <bot>{% endif %}"
)
# As Kimi-K2's: arguments as text or object, and a thought.
EITHER = (
    "{{ bos_token }}{% for t in tools or [] %} {{ t.function.name }}{% endfor %}{% for m in messages %}"
    "{% if m.role == 'assistant' %} <bot>{% if m.reasoning_content %} w50 {{ m.reasoning_content }} w51{% endif %}"
    " {{ m.content or '' }}{% for c in m.tool_calls or [] %} w60 {{ c.function.name }} "
    "{% if c.function.arguments is string %}{{ c.function.arguments }}{% else %}{{ c.function.arguments | tojson }}"
    "{% endif %}{% endfor %} {{ eos_token }}{% else %} <user> {{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} <bot>{% endif %}"
)
AS_OBJECT = EITHER.replace("{% if c.function.arguments is string %}{{ c.function.arguments }}{% else %}", "").replace(
    "| tojson }}{% endif %}", "| tojson }}"
)
AS_ITEMS = AS_OBJECT.replace(
    "{{ c.function.arguments | tojson }}",
    "{% for k, v in c.function.arguments.items() %}{{ k }} {{ v }}{% endfor %}",
)
AS_TEXT = AS_OBJECT.replace("{{ c.function.arguments | tojson }}", "{{ c.function.arguments }}")
FORMS = {"V3": BY_NULL, "Kimi": EITHER, "objects": AS_OBJECT, "items": AS_ITEMS, "text": AS_TEXT}


def call(name="w7", arguments=None, **more):
    function = {"name": name} if arguments is None else {"name": name, "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": function}], **more}


def pieces(row, template):
    """The row's words, and those that are learned."""
    tokenizer = tiny_tokenizer(template)
    ids, labels = encode(row, tokenizer, 200)
    learned = [label for label in labels if label != IGNORED]
    return tuple(" ".join(tokenizer.convert_ids_to_tokens(some)) for some in (ids, learned))


@pytest.mark.parametrize("template", FORMS)
@pytest.mark.parametrize("content", [None, "", "absent"])
@pytest.mark.parametrize("arguments", [{"w8": "w9"}, '{"w8": "w9"}'], ids=["object", "text"])
def test_a_call_is_learned_in_the_form_that_the_template_takes(template, content, arguments):
    said = {} if content == "absent" else {"content": content}
    row = {"messages": [USER, call("w7", arguments, **said), RESULT, ANSWER]}
    words, learned = pieces(row, FORMS[template])
    shown = "w8 w9" if template == "items" else "<unk> <unk>"  # {"w8": and "w9"} are no words of the tokenizer
    assert learned == f"w60 w7 {shown} </s> w4 </s>"
    assert words.startswith("<s> <user> w1 <bot> w60 w7 ") and words.endswith("<user> w3 <bot> w4 </s>")


def test_arguments_keep_their_text_and_an_object_becomes_json():
    template = EITHER.replace("{{ c.function.arguments }}", "{{ c.function.arguments.replace('  ', ' w20 ') }}")
    assert "w20" in pieces({"messages": [USER, call("w7", '{"a":  1}', content=None)]}, template)[1]
    for arguments in ({"a": "é", "b": {"c": [1, None]}}, '{"a": "é", "b": {"c": [1, null]}}'):
        row = {"messages": [USER, call("w7", arguments, content=None)]}
        (_, _), (learned, is_learned) = [
            piece for piece in chat._pieces(row, Words(tiny_tokenizer(BY_NULL))) if piece[0]
        ]
        assert is_learned and learned == ' w60 w7 {"a": "é", "b": {"c": [1, null]}} </s>'


def test_a_null_content_is_not_learned_as_the_word_none():
    template = EITHER.replace("{{ m.content or '' }}", "{{ m.content }}")
    assert pieces({"messages": [USER, call("w7", {}, content=None)]}, template)[1] == "w60 w7 <unk> </s>"


def test_an_empty_content_that_hides_a_call_is_read_as_null_and_that_is_said(monkeypatch):
    said = []
    monkeypatch.setattr(templates.logger, "warning_once", said.append)
    for content in (None, ""):
        assert pieces({"messages": [USER, call("w7", "{}", content=content)]}, BY_NULL)[1] == "w60 w7 <unk> </s>"
    assert said == [
        "tool calls with an empty `content` are read with null instead: else the chat template would not show them"
    ]


LOST = {
    "tools": (
        {"messages": [USER, ANSWER], "tools": TOOLS},
        "`tools`, which would be lost: describe them",
    ),
    "tool_calls": ({"messages": [USER, call(content="")]}, "`tool_calls`, which would be lost: write the call into"),
    "tool_calls beside a text": (
        {"messages": [USER, call(content="w8")]},
        "`tool_calls` of a message that has `content`, too, which",
    ),
    "context": ({"messages": [USER, call(content="w8", mask=1), USER, ANSWER]}, "`tool_calls` of a message"),
    "reasoning_content": ({"messages": [USER, {**ANSWER, "reasoning_content": "w9"}]}, "`reasoning_content`, which"),
    "reasoning": (
        {"messages": [USER, {**ANSWER, "reasoning": "w9"}]},
        "`reasoning`, which would be lost",
    ),
    "function_call": ({"messages": [USER, {**ANSWER, "function_call": {"name": "w7"}}]}, "`function_call`, which"),
}


@pytest.mark.parametrize("name", LOST)
def test_what_a_template_does_not_show_is_refused_by_its_key(name):
    row, message = LOST[name]
    with pytest.raises(RowError) as caught:
        encode(row, tiny_tokenizer(TEMPLATE), 64)
    assert f"the chat template does not show {message}" in str(caught.value)
    assert "leave it out, or use another chat template" in str(caught.value)


def test_a_template_that_shows_them_learns_thought_and_call_and_reads_the_tools():
    answer = {**call("w7", {}, content="w8"), "reasoning_content": "w9"}
    words, learned = pieces({"messages": [USER, answer], "tools": TOOLS}, EITHER)
    assert words.startswith("<s> w70 <user> w1 <bot> w50 w9")
    assert learned == "w50 w9 w51 w8 w60 w7 <unk> </s>"


def test_a_call_of_v3_beside_a_text_is_refused_with_the_reason():
    with pytest.raises(RowError, match="does not show `tool_calls` of a message that has `content`, too"):
        encode({"messages": [USER, call("w7", "{}", content="w8")]}, tiny_tokenizer(BY_NULL), 64)


@pytest.mark.parametrize(
    "template",
    [
        BY_NULL.replace(" + ' ' + c['function']['arguments']", ""),
        EITHER.replace("m.tool_calls or []", "m.tool_calls[:1]"),
    ],
    ids=["names alone", "the first call"],
)
def test_calls_that_are_shown_in_part_are_refused(template):
    answer = call("w7", {"w8": 1}, content=None)
    answer["tool_calls"] *= 2
    with pytest.raises(RowError, match="does not show `arguments` of a tool call"):
        encode({"messages": [USER, answer]}, tiny_tokenizer(template), 64)


def test_what_is_said_beside_a_call_is_not_lost():
    calls_alone = EITHER.replace("{{ m.content or '' }}", "{% if not m.tool_calls %}{{ m.content }}{% endif %}")
    with pytest.raises(RowError, match="does not show `content` of a message that has `tool_calls`, too"):
        encode({"messages": [USER, call("w7", {}, content="w8")]}, tiny_tokenizer(calls_alone), 64)
    assert pieces({"messages": [USER, call("w7", {}, content="")]}, calls_alone)[1] == "w60 w7 <unk> </s>"


def test_arguments_that_are_no_json_can_be_shown_as_text():
    row = {"messages": [USER, call("w7", "w8 w9 }", content="")]}
    assert pieces(row, AS_TEXT)[1] == "w60 w7 w8 w9 <unk> </s>"


def test_text_that_is_no_json_is_no_object_for_a_template_that_takes_objects():
    with pytest.raises(RowError, match="does not show `arguments` of a tool call"):
        encode({"messages": [USER, call("w7", "no json", content="")]}, tiny_tokenizer(AS_OBJECT), 64)


def test_thoughts_that_a_template_drops_from_what_was_said_before_are_no_fault_of_a_context():
    """Only an answer that is learned has to show its thought."""
    drops = EITHER.replace("{% if m.reasoning_content %}", "{% if m.reasoning_content and loop.last %}")
    thought = {**ANSWER, "reasoning_content": "w9"}
    assert pieces({"messages": [USER, {**thought, "mask": 1}, USER, thought]}, drops)[1] == "w50 w9 w51 w4 </s>"
    with pytest.raises(RowError, match="rewrites earlier turns"):
        encode({"messages": [USER, thought, USER, thought]}, tiny_tokenizer(drops), 64)


def test_a_thought_is_learned_where_the_prompt_opens_otherwise_than_the_transcript():
    opens = EITHER.replace("%} <bot>{% endif %}", "%} <bot> w55{% endif %}").replace(" w50 {{", " {{")
    answer = {**ANSWER, "reasoning_content": "w9"}
    assert pieces({"messages": [USER, answer]}, opens)[1] == "w9 w51 w4 </s>"


def test_preferences_between_calls_and_on_thoughts_are_held_to_the_same():
    row = {"prompt": [USER], "chosen": [call("w7", {}, content=None)], "rejected": [call("w8", {}, content="")]}
    tokenizer = tiny_tokenizer(BY_NULL)
    (made,), _ = encode_preference(row, tokenizer, 64, "cut")
    assert tokenizer.convert_ids_to_tokens(made["chosen_ids"]) == ["w60", "w7", "<unk>", "</s>"]
    with pytest.raises(RowError, match="does not show `tool_calls`"):
        encode_preference(row, tiny_tokenizer(TEMPLATE), 64, "cut")
    with pytest.raises(RowError, match="does not show `tools`"):
        encode_preference({**row, "tools": json.dumps(TOOLS)}, tokenizer, 64, "cut")
