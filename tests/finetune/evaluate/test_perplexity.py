"""Perplexity of a text: equal to a plain computation, whatever the windows, and no logits of all tokens."""

import math

import pytest
import torch
from tiny import tiny_config, tiny_model
from tiny_run import WORDS, tiny_tokenizer
from torch import nn

from modeling_deepseek_moe.finetune.errors import UserError
from modeling_deepseek_moe.finetune.evaluate import perplexity
from modeling_deepseek_moe.finetune.evaluate.perplexity import TextScore, read_text, score_text

# Sums of 50 cross-entropies of about 4 nats in float32, added in another order.
RTOL = 1e-5


@pytest.fixture(scope="module")
def model():
    return tiny_model(tiny_config("v3", pad_token_id=2)).eval()


@pytest.fixture(scope="module")
def text():
    order = torch.randint(80, (50,), generator=torch.Generator().manual_seed(3)).tolist()
    return " ".join(WORDS[number] for number in order)


def plain(model, text, window, stride):
    """One window after the other, each token from the logits of the position before it."""
    tokenizer = tiny_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    nats, scored = 0.0, 0
    while scored < len(ids):
        end = min(len(ids), scored + (stride if scored else window - 1))
        begin = max(0, end - (window - 1))
        with torch.no_grad():
            logits = model(torch.tensor([[tokenizer.bos_token_id, *ids[begin:end]]])).logits[0].double()
        for place in range(scored, end):
            nats -= logits[place - begin].log_softmax(-1)[ids[place]].item()
        scored = end
    return nats


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("window, stride", [(60, None), (51, 50), (16, None), (16, 15), (9, 3), (2, 1)], ids=str)
def test_windows_of_any_width_score_what_a_plain_computation_does(model, text, window, stride, batch_size):
    expected = plain(model, text, window, stride or window // 2)
    found = score_text(model, tiny_tokenizer(), text, window=window, stride=stride, batch_size=batch_size)
    assert found.nats == pytest.approx(expected, rel=RTOL)
    assert (found.tokens, found.bytes) == (50, len(text))


def test_the_figures_are_of_the_same_sum():
    score = TextScore(nats=200 * math.log(2), tokens=50, bytes=100)
    assert score.perplexity == pytest.approx(16)
    assert score.bits_per_byte == pytest.approx(2)


def test_bytes_are_those_of_the_file_and_not_characters(tmp_path, model):
    path = tmp_path / "text.txt"
    path.write_bytes("w1 w2 ä\r\nw3".encode())
    assert score_text(model, tiny_tokenizer(), read_text(path)).bytes == 12


def test_a_text_that_begins_with_bos_has_it_once(model, text):
    assert score_text(model, tiny_tokenizer(), f"<s> {text}").nats == score_text(model, tiny_tokenizer(), text).nats


def test_logits_of_all_tokens_never_exist(model, text, monkeypatch):
    """Ten rows at a time, with a plain head and with one that has a hook."""
    whole = score_text(model, tiny_tokenizer(), text).nats
    monkeypatch.setattr(perplexity, "_CHUNK_BYTES", 10 * 4 * model.config.vocab_size)
    widest, real = [], nn.functional.linear

    def watched(states, weight, *rest):
        if weight.data_ptr() == model.lm_head.weight.data_ptr():
            widest.append(states.shape[:-1].numel())
        return real(states, weight, *rest)

    monkeypatch.setattr(nn.functional, "linear", watched)
    assert score_text(model, tiny_tokenizer(), text).nats == pytest.approx(whole, rel=RTOL)
    rows = []
    hook = model.lm_head.register_forward_pre_hook(lambda module, inputs: rows.append(inputs[0].shape[0]))
    assert score_text(model, tiny_tokenizer(), text).nats == pytest.approx(whole, rel=RTOL)
    hook.remove()
    assert max(widest) <= 10 and max(rows) <= 10 and sum(rows) == 50


@pytest.mark.parametrize(
    "content, message", [(None, "No such file"), (b"", "is empty"), (b"\xff\xfe", "not UTF-8")], ids=str
)
def test_a_text_that_cannot_be_read_is_named(tmp_path, content, message):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"text.txt.*{message}"):
        read_text(path)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"window": 1}, "a window of 1 tokens: it must hold 2 and fit into the model's context of"),
        ({"window": 10**6}, "a window of 1000000 tokens"),
        ({"window": 8, "stride": 8}, "a stride of 8 tokens: it lies between 1 and 7"),
        ({"stride": 0}, "a stride of 0 tokens"),
    ],
    ids=str,
)
def test_windows_that_do_not_fit_are_refused(model, text, options, message):
    with pytest.raises(UserError, match=message):
        score_text(model, tiny_tokenizer(), text, **options)
