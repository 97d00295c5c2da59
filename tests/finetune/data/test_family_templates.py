"""Chat templates in the forms of the sibling families, as stand-ins: their own files are not here.

GLM opens with two marks, names each turn and ends it by the next one's name (`<|user|>` is one of its end tokens);
Mistral puts questions between marks and ends answers with its end of text.
"""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from modeling_deepseek_moe.finetune.data.chat import IGNORED, encode

GLM = (
    "[gMASK]<sop>{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}"
    "{% else %}<|assistant|><think></think>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think></think>{% endif %}"
)
MISTRAL = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
    "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
GLM_START = "[gMASK] <sop> <|user|> one <|assistant|> <think> </think>"
MARKS = ["[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<think>", "</think>", "<s>", "[INST]", "[/INST]"]
TALK = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
]


def tokenizer_of(template: str, eos: str) -> PreTrainedTokenizerFast:
    words = ["<unk>", *MARKS, "</s>", "<|endoftext|>", "one", "two", "three", "four"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([*MARKS, "</s>", "<|endoftext|>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, eos_token=eos, unk_token="<unk>")


@pytest.mark.parametrize(
    "template, eos, turns",
    [
        (
            GLM,
            "<|endoftext|>",
            [GLM_START, "two", "<|user|> three <|assistant|> <think> </think>", "four <|endoftext|>"],
        ),
        (MISTRAL, "</s>", ["<s> [INST] one [/INST]", "two </s>", "[INST] three [/INST]", "four </s>"]),
    ],
    ids=["GLM", "Mistral"],
)
def test_a_conversation_learns_its_answers_and_where_to_stop(template, eos, turns):
    tokenizer = tokenizer_of(template, eos)
    ids, labels = encode({"messages": TALK}, tokenizer, 100)
    assert tokenizer.convert_ids_to_tokens(ids) == " ".join(turns).split()
    expected = [token if turn % 2 else None for turn, text in enumerate(turns) for token in text.split()]
    assert [None if label == IGNORED else tokenizer.convert_ids_to_tokens(label) for label in labels] == expected
    # What a chat sends to the model before an answer is what came before it in training.
    prompt = tokenizer.apply_chat_template(TALK[:3], add_generation_prompt=True)["input_ids"]
    assert prompt == ids[: len(" ".join(turns[:3]).split())]
