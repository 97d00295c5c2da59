"""Tokenizers in tiktoken's files: the ids of their code without running it, saved as ordinary ones, or refused."""

import json
import random

import pytest
from tiktoken_folder import (
    CODE,
    NAMED,
    PADDING,
    SORTS_TOOLS,
    SOURCE,
    TEMPLATE,
    random_text,
    tiktoken_folder,
    trained_ranks,
    write_ranks,
)
from tokenization_kimi import TikTokenTokenizer
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

from modeling_deepseek_moe.finetune.errors import UserError
from modeling_deepseek_moe.finetune.model.tiktoken_files import Unreadable, read_tiktoken
from modeling_deepseek_moe.finetune.model.tokenizer import load_tokenizer

TALK = [{"role": "user", "content": "Hello, 世界!"}, {"role": "assistant", "content": "HTTPServer's"}]
TOOLS = [{"type": "function", "function": {"parameters": {"b": 1, "a": 2}, "name": "w"}}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiktoken_folder(tmp_path_factory.mktemp("kimi"))[0]


@pytest.fixture(scope="module")
def ours(folder):
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def code(folder):
    return load_tokenizer(folder, trust_remote_code=True)


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_texts_of_many_scripts_have_the_ids_of_the_code(ours, code):
    assert type(code).__module__.startswith("transformers_modules.")
    rng = random.Random(2)
    for text in [random_text(rng) for _ in range(1500)]:
        found = ids(ours, text)
        assert found == ids(code, text), repr(text)
        assert ours.decode(found) == code.decode(found) == text


def test_texts_have_the_ids_of_tiktoken(folder, ours):
    tiktoken = pytest.importorskip("tiktoken", reason="not installed: `make` installs it")
    ranks = trained_ranks()
    special = {token: i for token, i in ours.get_vocab().items() if i >= len(ranks)}
    encoding = tiktoken.Encoding(
        "it", pat_str=TikTokenTokenizer.pat_str, mergeable_ranks=ranks, special_tokens=special
    )
    rng = random.Random(3)
    for text in [random_text(rng) for _ in range(3000)]:
        assert ids(ours, text) == encoding.encode(text, allowed_special="all"), repr(text)


@pytest.mark.parametrize("letters", ["ab", "abc"])
def test_ranks_in_any_order_merge_as_the_code_merges_them(tmp_path, letters):
    """Tokens that no training would make: parts of a token may have higher ranks than it, and overlap themselves."""
    for seed in range(8):
        rng = random.Random(seed)
        made = {"".join(rng.choices(letters, k=rng.randrange(2, 9))).encode() for _ in range(100)}
        tokens = [bytes([i]) for i in range(256)] + sorted(made)
        rng.shuffle(tokens)
        folder, _ = tiktoken_folder(tmp_path / f"{seed}", {token: rank for rank, token in enumerate(tokens)})
        ours, code = load_tokenizer(folder), load_tokenizer(folder, trust_remote_code=True)
        for _ in range(200):
            text = "".join(rng.choices(letters, k=rng.randrange(1, 50)))
            assert ids(ours, text) == ids(code, text), (seed, text)


def test_special_tokens_have_their_ids_and_reserved_ones_fill_up(ours):
    first = len(trained_ranks())
    assert len(ours) == first + 256
    assert ids(ours, "[BOS]<|im_end|>[PAD]") == [first, first + 2, first + PADDING]
    assert ids(ours, f"<|reserved_token_{first + 5}|>") == [first + 5]
    names = ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id")
    assert [getattr(ours, name) - first for name in names] == [0, 1, 254, 255]
    # As with the code: what a config does not call special stays in a text.
    marks = [first + i for i, name in NAMED.items() if name in ("<|im_middle|>", "<|im_user|>")]
    assert ours.decode([*marks, first + 5], skip_special_tokens=True) == f"<|im_middle|><|reserved_token_{first + 5}|>"


def test_saved_it_is_an_ordinary_tokenizer_that_loads_back_equal(ours, tmp_path):
    ours.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file() and not (tmp_path / "tiktoken.model").exists()
    assert "auto_map" not in json.loads((tmp_path / "tokenizer_config.json").read_text())
    for back in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)):
        assert back.get_vocab() == ours.get_vocab() and back.chat_template == ours.chat_template
        assert back.special_tokens_map == ours.special_tokens_map
        assert back.model_max_length == ours.model_max_length == 4096
        rng = random.Random(4)
        for text in [random_text(rng) for _ in range(300)]:
            assert ids(back, text) == ids(ours, text)
            assert back.decode(ids(back, text), skip_special_tokens=True) == ours.decode(
                ids(ours, text), skip_special_tokens=True
            )


@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja"])
def test_chats_are_those_of_the_code(tmp_path, place):
    kept = {} if place == "tokenizer_config.json" else {"chat_template": None}
    folder, _ = tiktoken_folder(tmp_path, **kept)
    if not kept:
        assert not (folder / "chat_template.jinja").exists()
    else:
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    ours, code = load_tokenizer(folder), load_tokenizer(folder, trust_remote_code=True)
    for options in ({"add_generation_prompt": True}, {"tools": TOOLS}):
        text = ours.apply_chat_template(TALK, tokenize=False, **options)
        assert text == code.apply_chat_template(TALK, tokenize=False, **options)
        assert ids(ours, text) == ids(code, text)


def test_further_chat_templates_come_along(tmp_path):
    folder, _ = tiktoken_folder(tmp_path, chat_template=None, source=SOURCE + SORTS_TOOLS)
    (folder / "chat_template.jinja").write_text("one")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools | tojson }}")
    assert load_tokenizer(folder).chat_template == {
        "default": "one",
        "tool_use": "{{ tools | tojson(sort_keys=true) }}",
    }
    named = [{"name": "default", "template": "one"}, {"name": "tool_use", "template": "{{ tools | tojson }}"}]
    other, _ = tiktoken_folder(tmp_path / "other", chat_template=named, source=SOURCE + SORTS_TOOLS)
    assert load_tokenizer(other).chat_template == load_tokenizer(folder).chat_template


@pytest.mark.parametrize("written", ["tools | tojson", "tools|tojson(separators=(',', ':'))"])
def test_tools_that_the_code_sorts_are_sorted_by_the_template(tmp_path, written):
    template = TEMPLATE.replace("tools | tojson", written)
    folder, _ = tiktoken_folder(tmp_path, source=SOURCE + SORTS_TOOLS, chat_template=template)
    ours, code = load_tokenizer(folder), load_tokenizer(folder, trust_remote_code=True)
    text = code.apply_chat_template(TALK, tools=TOOLS, tokenize=False)
    assert ours.apply_chat_template(TALK, tools=TOOLS, tokenize=False) == text
    assert text.index('"name"') < text.index('"parameters"') and text.index('"a"') < text.index('"b"')


def test_what_the_config_leaves_out_is_what_the_code_takes_for_it(tmp_path):
    folder, first = tiktoken_folder(tmp_path, bos_token=None, eos_token=None)
    ours, code = load_tokenizer(folder), load_tokenizer(folder, trust_remote_code=True)
    assert (ours.bos_token_id, ours.eos_token_id) == (code.bos_token_id, code.eos_token_id) == (first, first + 1)


def test_nothing_of_the_code_runs(tmp_path):
    source = f"open({str(tmp_path / 'ran')!r}, 'w')\n" + SOURCE
    load_tokenizer(tiktoken_folder(tmp_path / "kimi", source=source)[0])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.replace('"|".join(', "sorted("), "does not say `pat_str` in a form that can be read without"),
        (lambda s: s.replace(r"\s+(?!\S)", r"\s++$"), r"`pat_str` has '\$', which other libraries than tiktoken read"),
        (lambda s: s.replace("{1,3}", "{1,3}+"), r"`pat_str` has '}\+', which"),
        (lambda s: s.replace("{1,3}", "{1,3})"), "`pat_str` cannot be read: Oniguruma error"),
        (lambda s: s.replace("= 256", "= 2**8"), "does not say `num_reserved_special_tokens`"),
        (lambda s: s + SORTS_TOOLS.replace("deep_sort", "other"), "renders chats by itself"),
        (lambda s: s.replace("class Tik", "class Tok"), "does not say `pat_str`"),
        (lambda s: "(" + s, "cannot be read"),
    ],
    ids=["pattern", "anchor", "possessive", "broken", "reserved", "chats", "class", "syntax"],
)
def test_what_would_have_to_be_run_is_refused_and_the_way_out_named(tmp_path, change, message):
    folder, _ = tiktoken_folder(tmp_path, source=change(SOURCE))
    with pytest.raises(Unreadable, match=message):
        read_tiktoken(folder, CODE)
    with pytest.raises(UserError, match=f"tokenization_kimi.py.*{message}.*`trust_remote_code: true`") as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)


def without(ranks, token):
    kept = [other for other in ranks if other != token]
    return {other: rank for rank, other in enumerate(kept)}


@pytest.mark.parametrize(
    "ranks, message",
    [
        (lambda ranks: {**ranks, b"\xff\xff\xff": len(ranks) + 3}, "do not have the ranks 0 to "),
        (lambda ranks: without(ranks, b"z"), "the byte 122 is no token"),
    ],
    ids=["a gap", "a byte"],
)
def test_ranks_that_cannot_be_right_are_refused(tmp_path, ranks, message):
    folder, _ = tiktoken_folder(tmp_path)
    write_ranks(folder / "tiktoken.model", ranks(trained_ranks()))
    with pytest.raises(UserError, match=message):
        load_tokenizer(folder)


@pytest.mark.parametrize("line", ["aGk", "a*k= 7", "aGk= seven", "aGk= 7 8"])
def test_a_line_that_is_no_token_with_its_rank_is_named(tmp_path, line):
    folder, _ = tiktoken_folder(tmp_path)
    path = folder / "tiktoken.model"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError, match=f"tiktoken.model, line {len(trained_ranks()) + 1}: not a token in base64"):
        load_tokenizer(folder)


def test_a_special_token_that_is_among_the_ranks_is_refused(tmp_path):
    ranks = trained_ranks()
    folder, first = tiktoken_folder(tmp_path, {**ranks, b"[BOS]": len(ranks)})
    with pytest.raises(UserError, match=rf"'\[BOS\]' should have the id {first}, but is {first - 1}"):
        load_tokenizer(folder)


def test_files_whose_code_nobody_names_are_not_read_by_another_models_pattern(tmp_path, monkeypatch):
    """transformers reads them by Llama's, if it has tiktoken."""
    folder, _ = tiktoken_folder(tmp_path, auto_map=None, tokenizer_class=None)
    monkeypatch.setattr(TikTokenConverter, "load_tiktoken_bpe", staticmethod(lambda path: trained_ranks()))
    with pytest.raises(UserError, match="tiktoken.model has the tokens but not the pattern"):
        load_tokenizer(folder)
