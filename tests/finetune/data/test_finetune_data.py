"""Rows to token ids and labels."""

import json
import subprocess
import sys

import pytest
import torch
from huggingface_hub import HfApi
from places import SUPPORT
from tiny_run import TEMPLATE, tiny_tokenizer, write_jsonl

from modeling_deepseek_moe.finetune.data.batches import Collator
from modeling_deepseek_moe.finetune.data.rows import IGNORED, encode, load_data
from modeling_deepseek_moe.finetune.demo.local_hub import LocalHub
from modeling_deepseek_moe.finetune.errors import UserError

BOS, EOS = "<s>", "</s>"
USER = {"role": "user", "content": "w1 w2"}
ANSWER = {"role": "assistant", "content": "w3 w4"}


def words(tokenizer, ids):
    return " ".join(tokenizer.convert_ids_to_tokens(ids))


def encoded(row, tokenizer=None, max_length=64, **rules):
    """The row's tokens, and those of them that are learned, as text."""
    tokenizer = tokenizer or tiny_tokenizer()
    ids, labels = encode(row, tokenizer, max_length, **rules)
    assert len(ids) == len(labels)
    assert all(label in (token, IGNORED) for token, label in zip(ids, labels, strict=True))
    return words(tokenizer, ids), words(tokenizer, [label for label in labels if label != IGNORED])


def load(tmp_path, rows, max_length=64, tokenizer=None):
    path = rows if isinstance(rows, str) else str(write_jsonl(tmp_path / "rows.jsonl", rows))
    return load_data(path, "train", tokenizer or tiny_tokenizer(), max_length, tmp_path / "cache")


@pytest.mark.parametrize(
    "row, tokens, learned",
    [
        ({"text": "w1 w2"}, "<s> w1 w2 </s>", "w1 w2 </s>"),
        ({"prompt": "w1 w2", "completion": " w3"}, "<s> w1 w2 w3 </s>", "w3 </s>"),
        ({"messages": [USER, ANSWER]}, "<s> <user> w1 w2 <bot> w3 w4 </s>", "w3 w4 </s>"),
        (
            {"messages": [USER, ANSWER, {"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}]},
            "<s> <user> w1 w2 <bot> w3 w4 </s> <user> w5 <bot> w6 </s>",
            "w3 w4 </s> w6 </s>",
        ),
        ({"messages": [USER, ANSWER, USER]}, "<s> <user> w1 w2 <bot> w3 w4 </s> <user> w1 w2", "w3 w4 </s>"),
        ({"text": "w1", "prompt": None, "completion": None}, "<s> w1 </s>", "w1 </s>"),
        ({"text": "w1", "source": "elsewhere", "id": 3}, "<s> w1 </s>", "w1 </s>"),
    ],
    ids=["text", "prompt", "messages", "two turns", "ends with the user", "empty columns", "other columns"],
)
def test_each_kind_of_row_learns_its_part(row, tokens, learned):
    assert encoded(row) == (tokens, learned)


@pytest.mark.parametrize("text", ["w1", "<s> w1", "<s> <s> w1", "<s> w1 </s>"])
def test_bos_stands_exactly_once_and_eos_ends_the_row(text):
    assert encoded({"text": text}, split_special_tokens=False)[0] == "<s> w1 </s>"


def test_a_template_without_bos_is_left_as_it_will_be_prompted():
    tokenizer = tiny_tokenizer(TEMPLATE.replace("{{ bos_token }}", ""))
    assert encoded({"messages": [USER, ANSWER]}, tokenizer)[0] == "<user> w1 w2 <bot> w3 w4 </s>"


def test_a_template_that_never_ends_an_answer_gets_eos():
    tokenizer = tiny_tokenizer(TEMPLATE.replace("{{ eos_token }}", ""))
    assert encoded({"messages": [USER, ANSWER]}, tokenizer) == ("<s> <user> w1 w2 <bot> w3 w4 </s>", "w3 w4 </s>")


def test_what_a_template_opens_only_for_generation_is_not_taken_for_the_answer():
    """DeepSeek-R1's template ends the generation prompt with `<think>`, which no transcript has there."""
    tokenizer = tiny_tokenizer(TEMPLATE.replace("%} <bot>{% endif %}", "%} <bot> w79{% endif %}"))
    assert encoded({"messages": [USER, ANSWER]}, tokenizer) == ("<s> <user> w1 w2 <bot> w3 w4 </s>", "w3 w4 </s>")


def test_a_template_that_rewrites_earlier_turns_is_refused():
    template = TEMPLATE.replace("{{ m.content }} {{ eos", "{% if loop.last %}w78 {% endif %}{{ m.content }} {{ eos")
    row = {"messages": [USER, ANSWER, USER, ANSWER]}
    with pytest.raises(UserError, match="rewrites earlier turns.*use one answer a row"):
        encode(row, tiny_tokenizer(template), 64)
    assert encoded({"messages": [USER, ANSWER]}, tiny_tokenizer(template))[1] == "w78 w3 w4 </s>"


def test_tools_reach_the_chat_template():
    tokenizer = tiny_tokenizer("{% for t in tools %}{{ t.name }} {% endfor %}" + TEMPLATE)
    row = {"messages": [USER, ANSWER], "tools": [{"name": "w70"}]}
    assert encoded(row, tokenizer)[0].startswith("w70 <s> <user>")


def test_a_long_row_is_cut_and_then_does_not_claim_to_end():
    tokens, learned = encoded({"text": "w1 w2 w3 w4"}, max_length=4)
    assert (tokens, learned) == ("<s> w1 w2 w3", "w1 w2 w3")


def test_rows_of_several_kinds_are_read_in_order(tmp_path):
    data = load(tmp_path, [{"text": "w1"}, {"messages": [USER, ANSWER]}, {"prompt": "w2", "completion": "w3"}])
    tokenizer = tiny_tokenizer()
    assert [words(tokenizer, row["input_ids"])[:6] for row in data] == ["<s> w1", "<s> <u", "<s> w2"]


def test_lines_end_only_at_line_feeds_and_blank_ones_are_skipped(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "w1\xe2\x80\xa8w2"}\r\n\n  \n{"text": "w3"}')
    assert len(load(tmp_path, str(path))) == 2


def test_a_changed_file_is_read_again(tmp_path):
    assert len(load(tmp_path, [{"text": "w1"}])) == 1
    assert len(load(tmp_path, [{"text": "w1"}, {"text": "w2"}])) == 2


@pytest.mark.parametrize(
    "line, message",
    [
        ("{bad", "not JSON"),
        ("\udcff", "not JSON"),
        ('"text"', "a row is a JSON object"),
        ("{}", "has `messages`, `prompt` and `completion`, or `text`, as text; this one has none"),
        ('{"txt": "w1"}', "this one has txt"),
        ('{"prompt": "w1"}', "this one has prompt"),
        ('{"text": 5}', "'text' is 5"),
        ('{"messages": "w1"}', '`messages` is a list of {"role": ..., "content": ...}'),
        ('{"messages": [{"role": "user", "content": "w1"}]}', "no turn with the role 'assistant'"),
        ('{"messages": [{"role": "assistant", "content": {"a": 1}}, 3]}', "`messages` is a list of"),
    ],
    ids=["cut off", "not UTF-8", "no object", "empty", "unknown", "half", "number", "string", "no answer", "no role"],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "w1"}\n\n' + line + "\n", encoding="utf-8", errors="surrogateescape")
    with pytest.raises(UserError) as caught:
        load(tmp_path, str(path))
    assert f"{path}, line 3: " in str(caught.value)
    assert message in str(caught.value)


def test_messages_need_a_chat_template(tmp_path):
    with pytest.raises(UserError, match="line 1: the chat template refuses `messages`.*chat_template"):
        load(tmp_path, [{"messages": [USER, ANSWER]}], tokenizer=tiny_tokenizer(template=None))


@pytest.mark.parametrize("source", ["absent.jsonl", "./absent", "/absent/rows"])
def test_a_missing_file_is_not_looked_for_on_the_hub(tmp_path, source):
    with pytest.raises(UserError, match="does not exist"):
        load(tmp_path, source)


def test_a_folder_and_an_empty_file_are_refused(tmp_path):
    with pytest.raises(UserError, match="is a folder"):
        load(tmp_path, str(tmp_path))
    with pytest.raises(UserError, match="no rows to learn from"):
        load(tmp_path, [])


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_padded_on_the_right_and_learns_no_padding(side):
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side
    rows = [{"input_ids": [0, 10, 1], "labels": [IGNORED, 10, 1]}, {"input_ids": [0, 1], "labels": [IGNORED, 1]}]
    batch = Collator(tokenizer)(rows)
    assert torch.equal(batch["input_ids"], torch.tensor([[0, 10, 1], [0, 1, 2]]))
    assert torch.equal(batch["attention_mask"], torch.tensor([[1, 1, 1], [1, 1, 0]]))
    assert torch.equal(batch["labels"], torch.tensor([[IGNORED, 10, 1], [IGNORED, 1, IGNORED]]))
    assert tokenizer.padding_side == side


def test_a_tokenizer_without_padding_pads_with_eos_and_still_learns_eos():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    batch = Collator(tokenizer)([{"input_ids": [0, 5, 1], "labels": [0, 5, 1]}, {"input_ids": [1], "labels": [1]}])
    assert batch["labels"].tolist() == [[0, 5, 1], [1, IGNORED, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_rows_survive_as_json_with_unlike_columns(tmp_path):
    """Columns of unlike types would break a table of the rows themselves; only token ids are kept."""
    rows = [{"text": "w1", "extra": 1}, {"text": "w2", "extra": {"deep": [1]}}, {"text": "w3", "extra": "x"}]
    assert len(load(tmp_path, rows)) == 3
    assert json.loads(json.dumps(load(tmp_path, rows)[0])) == {"input_ids": [0, 7, 1], "labels": [IGNORED, 7, 1]}


FROM_HUB = """
import sys
from tiny_run import tiny_tokenizer
from modeling_deepseek_moe.finetune.data.rows import load_data
from modeling_deepseek_moe.finetune.errors import UserError
tokenizer = tiny_tokenizer()
for row in load_data("me/rows", "train", tokenizer, 64, sys.argv[1]):
    print(tokenizer.decode(row["input_ids"]))
for name, split in (("me/absent", "train"), ("me/rows", "test")):
    try:
        load_data(name, split, tokenizer, 64, sys.argv[1])
    except UserError as error:
        print(error)
"""


def test_rows_of_a_hub_data_set_are_read_by_name(tmp_path):
    """Columns a row does not have come back as None, in the row and inside its messages."""
    rows = [{"messages": [USER, {**ANSWER, "name": "w9"}]}, {"text": "w1"}]
    path = write_jsonl(tmp_path / "train.jsonl", rows)
    with LocalHub(tmp_path / "hub") as hub:
        api = HfApi(endpoint=hub.endpoint, token="any")
        api.create_repo("me/rows", repo_type="dataset")
        api.upload_file(path_or_fileobj=path, path_in_repo="train.jsonl", repo_id="me/rows", repo_type="dataset")
        done = subprocess.run(
            [sys.executable, "-c", FROM_HUB, str(tmp_path / "cache")],
            env={**hub.environment(tmp_path / "home"), "PYTHONPATH": str(SUPPORT)},
            capture_output=True,
            text=True,
            timeout=240,
        )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "Rows of me/rows: read as 1 messages, 1 text"
    assert lines[1:3] == ["<s> <user> w1 w2 <bot> w3 w4 </s>", "<s> w1 </s>"]
    assert "cannot load data 'me/absent', split 'train': " in lines[3]
    assert "cannot load data 'me/rows', split 'test': " in lines[4]
