"""Of a long text no more is tokenized than is kept, and what is kept is what the whole text would have."""

import random

import pytest
from tiny_run import tiny_tokenizer
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from modeling_deepseek_moe.finetune.data.chat import encode, encode_fitting
from modeling_deepseek_moe.finetune.data.preferences import encode_preference
from modeling_deepseek_moe.finetune.data.report import RowError
from modeling_deepseek_moe.finetune.data.words import Words, words_of

PIECES = [
    *("the quick ", "fox", " ", "  ", "\n", "\n\n", "\t", "12", "'s", "don't ", "中文", "。", "é", "e\u0301"),
    *("<think>", "ABCdef", "_-_", "...", "🙂", "👩‍👩‍👧", "\r\n", "x" * 40, " " * 100, "9" * 200, "ä" * 80, "，", "Ⅷ"),
]
ALPHABET = pre_tokenizers.ByteLevel.alphabet()
RIGHT_TO_LEFT = pre_tokenizers.Split(Regex(r"\d{1,3}(?=(?:\d{3})*\b)"), "isolated")
TOKENIZERS = {
    "bytes": (models.BPE(), pre_tokenizers.ByteLevel(), None, trainers.BpeTrainer, {"initial_alphabet": ALPHABET}),
    "digits from the right": (
        models.BPE(),
        pre_tokenizers.Sequence([RIGHT_TO_LEFT, pre_tokenizers.ByteLevel()]),
        None,
        trainers.BpeTrainer,
        {"initial_alphabet": ALPHABET},
    ),
    "SentencePiece": (
        models.Unigram(),
        pre_tokenizers.Metaspace(),
        normalizers.NFKC(),
        trainers.UnigramTrainer,
        {"unk_token": "<unk>", "special_tokens": ["<unk>"]},
    ),
    "no words": (
        models.BPE(unk_token="<unk>"),
        None,
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        trainers.BpeTrainer,
        {"special_tokens": ["<unk>"]},
    ),
}


def trained(name):
    model, pre_tokenizer, normalizer, trainer, options = TOKENIZERS[name]
    tokenizer = Tokenizer(model)
    if pre_tokenizer:
        tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer:
        tokenizer.normalizer = normalizer
    texts = ["the quick brown fox 123 jumps over a lazy dog's tail, 中文 text\n\n  x  " + str(i) for i in range(200)]
    tokenizer.train_from_iterator(texts, trainer(vocab_size=400, show_progress=False, **options))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=["<think>"])


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_first_ids_are_those_of_the_whole_text(name):
    tokenizer, numbers = trained(name), random.Random(name)
    words, bounded = Words(tokenizer), 0
    for _ in range(12):
        text = "".join(numbers.choices(PIECES, k=numbers.randint(50, 700)))
        whole = tokenizer(text, add_special_tokens=False)["input_ids"]
        for room in (1, 7, 40):
            ids, is_all = words.ids(text, room)
            assert ids == (whole if is_all else whole[: len(ids)]) and (is_all or len(ids) >= room)
            bounded += not is_all
    # Where a tokenizer cuts a text at its added tokens alone, little of it is sure before all of it is read.
    assert bounded > 0 or name == "no words"


class Counting:
    """Counts the characters that a tokenizer reads."""

    def __init__(self, monkeypatch):
        self.characters, read = 0, PreTrainedTokenizerFast._encode_plus

        def counted(tokenizer, text, *args, **kwargs):
            self.characters += len(text)
            return read(tokenizer, text, *args, **kwargs)

        monkeypatch.setattr(PreTrainedTokenizerFast, "_encode_plus", counted)


LONG = "w1 w2 w3. " * 100_000
ROWS = {
    "text": {"text": LONG},
    "completion": {"prompt": "w1", "completion": LONG},
    "prompt": {"prompt": LONG, "completion": "w1"},
    "chat": {"messages": [{"role": "user", "content": LONG}, {"role": "assistant", "content": LONG}]},
}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_a_megabyte_is_read_as_far_as_it_is_kept(name, monkeypatch):
    tokenizer = tiny_tokenizer()
    whole, _ = encode(ROWS[name], tokenizer, 10**7)
    counted = Counting(monkeypatch)
    ids, labels = encode(ROWS[name], tokenizer, 128)
    assert ids == whole[:128] and len(labels) == 128
    assert counted.characters < 10_000
    if name in ("text", "completion"):
        (part,), made = encode_fitting(ROWS[name], tokenizer, 128, "cut")
        assert (part["input_ids"], made) == (ids, "cut")
    with pytest.raises(RowError, match="more tokens than max_length=128"):
        encode_fitting(ROWS[name], tokenizer, 128, "skip")
    assert counted.characters < 40_000


def test_a_preference_is_read_as_far_as_it_is_kept(monkeypatch):
    counted = Counting(monkeypatch)
    row = {"prompt": "w1", "chosen": f"w2 {LONG}", "rejected": f"w3 {LONG}"}
    (made,), how = encode_preference(row, tiny_tokenizer(), 128, "cut")
    assert [len(ids) for ids in made.values()] == [2, 126, 126] and how == "cut"
    with pytest.raises(RowError, match="nothing left to learn"):
        encode_preference({**row, "prompt": LONG}, tiny_tokenizer(), 128, "cut")
    assert counted.characters < 40_000


def test_a_row_that_begins_with_bos_again_and_again_keeps_what_follows():
    text = "<s> " * 5000 + "w1"
    ids, _ = encode({"text": text}, tiny_tokenizer(), 64, split_special_tokens=False)
    assert tiny_tokenizer().convert_ids_to_tokens(ids) == ["<s>", "w1", "</s>"]


def test_a_failure_of_the_tokenizer_is_a_bad_row():
    class PanicException(BaseException):
        """As Rust's, which is no Exception."""

    def fail(*args, **kwargs):
        raise PanicException("Onig: Regex search error: retry-limit-in-match over")

    words = words_of(tiny_tokenizer())
    words._encode = fail
    with pytest.raises(RowError, match="the tokenizer fails on the text: Onig"):
        words.ids("w1")
    words._encode = lambda text: (_ for _ in ()).throw(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        words.ids("w1")
