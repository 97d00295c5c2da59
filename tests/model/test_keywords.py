"""What a forward does with keywords: those of transformers and its trainers pass, any other is refused by its name."""

import pytest
import torch
import transformers
from tiny import tiny_config, tiny_ids, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DynamicCache, GenerationMixin, PreTrainedTokenizerFast, pipeline
from transformers.utils import TransformersKwargs

from modeling_deepseek_moe import (
    DeepseekMoeForCausalLM,
    DeepseekMoeForSequenceClassification,
    DeepseekMoeForTokenClassification,
    DeepseekMoeModel,
)
from modeling_deepseek_moe.transformers_names import CACHE_NAME, KNOWN_KEYWORDS

CLASSES = [
    DeepseekMoeModel,
    DeepseekMoeForCausalLM,
    DeepseekMoeForSequenceClassification,
    DeepseekMoeForTokenClassification,
]


def model_of(model_class=DeepseekMoeForCausalLM, **overrides):
    return tiny_model(tiny_config("v3", eos_token_id=None, pad_token_id=2, **overrides), model_class=model_class)


def quickly_traced():
    return model_of(num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0)


@pytest.mark.parametrize(
    "name, meant",
    [
        ("position_id", "did you mean 'position_ids'?"),
        ("num_item_in_batch", "did you mean 'num_items_in_batch'?"),
        ("past_key_value", "did you mean 'past_key_values'?"),
        ("attn_mask", ""),
        ("kv", ""),
    ],
)
@pytest.mark.parametrize("model_class", CLASSES)
def test_an_unknown_keyword_is_refused_with_the_name_that_was_meant(model_class, name, meant):
    model = model_of(model_class)
    with pytest.raises(TypeError) as refused:
        model(tiny_ids(model.config), **{name: torch.ones(1)})
    message = str(refused.value)
    assert message.startswith(f"{model_class.__name__}.forward() got an unknown keyword {name!r}")
    assert f"transformers {transformers.__version__} is installed" in message and message.endswith(meant)
    assert "\n" not in message


def test_labels_are_unknown_where_nothing_computes_a_loss():
    model = model_of(DeepseekMoeModel)
    ids = tiny_ids(model.config)
    with pytest.raises(TypeError, match=r"DeepseekMoeModel.forward\(\) got an unknown keyword 'labels'"):
        model(ids, labels=ids)


@pytest.mark.parametrize("mode", ["training", "checkpointing", "compiled"])
def test_an_unknown_keyword_is_refused_in_every_mode(mode):
    model = quickly_traced().train()
    if mode == "checkpointing":
        model.gradient_checkpointing_enable()
    run = torch.compile(model, backend="eager") if mode == "compiled" else model
    ids = tiny_ids(model.config)
    with pytest.raises(TypeError, match="unknown keyword 'num_item_in_batch'"):
        run(ids, labels=ids, num_item_in_batch=4)


@torch.no_grad()
def test_known_keywords_do_not_break_a_graph():
    model = quickly_traced()
    ids = tiny_ids(model.config)
    keywords = {"token_type_ids": torch.zeros_like(ids), "output_attentions": False, "use_cache": False}
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids, **keywords).logits, model(ids).logits, atol=2e-5, rtol=0)


@pytest.mark.parametrize("model_class", CLASSES)
@torch.no_grad()
def test_what_tokenizers_and_trainers_leave_in_a_batch_changes_nothing(model_class):
    model = model_of(model_class)
    ids = tiny_ids(model.config).clamp_min(3)
    expected = model(ids)[0]
    left = {
        "token_type_ids": torch.ones_like(ids),
        "special_tokens_mask": torch.ones_like(ids),
        "offset_mapping": torch.ones(*ids.shape, 2, dtype=torch.long),
        "overflow_to_sample_mapping": torch.zeros(2, dtype=torch.long),
        "length": torch.full((2,), ids.shape[1]),
        "margin": torch.ones(1),
        "seq_idx": torch.zeros_like(ids),
        "num_items_in_batch": torch.tensor(7),
        "output_router_logits": False,
        "cache_position": torch.arange(ids.shape[1]),
    }
    assert torch.equal(model(ids, **left)[0], expected)
    assert left.keys() <= KNOWN_KEYWORDS


def test_every_keyword_of_transformers_own_is_known():
    assert TransformersKwargs.__optional_keys__ <= KNOWN_KEYWORDS


def test_a_keyword_without_a_value_says_nothing():
    model = model_of()
    ids = tiny_ids(model.config)
    assert torch.equal(model(ids, pixel_values=None).logits, model(ids).logits)


def test_the_cache_under_a_third_name_stops_generation(monkeypatch):
    """A transformers that renames it again must not generate wrong text."""
    prepare = GenerationMixin.prepare_inputs_for_generation

    def renamed(self, *args, **kwargs):
        inputs = prepare(self, *args, **kwargs)
        inputs["layer_states"] = inputs.pop(CACHE_NAME)
        return inputs

    monkeypatch.setattr(GenerationMixin, "prepare_inputs_for_generation", renamed)
    model = model_of()
    with pytest.raises(TypeError, match="unknown keyword 'layer_states' .transformers 5"):
        model.generate(tiny_ids(model.config), max_new_tokens=4, do_sample=False)
    with pytest.raises(TypeError, match="unknown keyword 'layer_states'"):
        model(tiny_ids(model.config), layer_states=DynamicCache(config=model.config))


def test_pipelines_pass_what_their_tokenizer_leaves():
    words = ["[BOS]", "[EOS]", "[PAD]", *(f"w{i}" for i in range(3, 96))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[PAD]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask", "special_tokens_mask"],
    )
    assert "token_type_ids" in tokenizer("w5 w9")
    for task, model_class in [
        ("text-classification", DeepseekMoeForSequenceClassification),
        ("token-classification", DeepseekMoeForTokenClassification),
        ("feature-extraction", DeepseekMoeModel),
    ]:
        answers = pipeline(task, model=model_of(model_class), tokenizer=tokenizer, device="cpu")("w5 w9 w40")
        assert len(answers) > 0
