"""The logits of a training step whose loss went in chunks: computed once, when read, as the plain forward would."""

import copy
import dataclasses
import pickle
import re

import pytest
import torch
from accelerate.utils.operations import convert_outputs_to_fp32
from one_rank import under_ddp
from tiny import tiny_ids, tiny_model, v1_config
from torch.utils import _pytree as pytree

from modeling_deepseek_moe.causal_lm_output import DeepseekMoeCausalLMOutput, DeferredLogits

THREE_ROWS = 3 * 96 * 4


def training_model(**overrides):
    return tiny_model(v1_config(loss_chunk_bytes=THREE_ROWS, aux_loss_alpha=0.0, **overrides)).train()


def outputs_and_logits(model=None):
    """The output of a step in chunks, its deferred logits, and the logits of a plain forward."""
    model = training_model() if model is None else model
    ids = tiny_ids(model.config)
    outputs = model(ids, labels=ids)
    return outputs, dict(outputs.items())["logits"], model(ids).logits


def is_computed(deferred: DeferredLogits) -> bool:
    return deferred._logits is not None


READS = {
    "attribute": lambda outputs: outputs.logits,
    "key": lambda outputs: outputs["logits"],
    "position": lambda outputs: outputs[1],
    "position from the end": lambda outputs: outputs[-len(outputs) + 1],
    "slice": lambda outputs: outputs[:2][1],
    "get": lambda outputs: outputs.get("logits"),
    "tuple": lambda outputs: outputs.to_tuple()[1],
    "dict": lambda outputs: dict(outputs)["logits"],
    "double star": lambda outputs: (lambda logits, **_: logits)(**outputs),
    "copy": lambda outputs: copy.copy(outputs).logits,
    "replace": lambda outputs: dataclasses.replace(outputs, loss=None).logits,
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_every_way_of_reading_gives_the_logits_computed_once(read):
    outputs, deferred, expected = outputs_and_logits()
    assert isinstance(outputs, DeepseekMoeCausalLMOutput) and not is_computed(deferred)
    logits = read(outputs)
    assert type(logits) is torch.Tensor and torch.equal(logits, expected) and logits.requires_grad
    assert read(outputs) is logits and outputs.logits is logits


IGNORING = {
    "the loss": lambda outputs: (outputs.loss, outputs["loss"], outputs[0], outputs.get("loss")),
    "keys": lambda outputs: ("logits" in outputs, list(outputs), len(outputs)),
    "other fields": lambda outputs: (outputs.aux_loss, outputs.past_key_values, outputs.hidden_states),
    "values and items": lambda outputs: (list(outputs.values()), list(outputs.items())),
    "repr": repr,
    "the search for tensors under DDP": lambda outputs: list(torch.nn.parallel.distributed._find_tensors(outputs)),
    "pytree": lambda outputs: pytree.tree_map(lambda leaf: leaf, outputs),
    "accelerate's float32": lambda outputs: convert_outputs_to_fp32(lambda: outputs)(),
}


@pytest.mark.parametrize("use", IGNORING.values(), ids=IGNORING)
def test_nothing_else_computes_them(use):
    outputs, deferred, _ = outputs_and_logits()
    use(outputs)
    assert not is_computed(deferred)


def test_the_tensors_that_ddp_finds_are_those_of_the_loss():
    outputs, _, _ = outputs_and_logits()
    assert any(tensor is outputs.loss for tensor in torch.nn.parallel.distributed._find_tensors(outputs))


def test_an_output_rebuilt_by_pytree_still_gives_logits():
    outputs, deferred, expected = outputs_and_logits()
    rebuilt = pytree.tree_map(lambda leaf: leaf, outputs)
    assert type(rebuilt) is type(outputs) and not is_computed(deferred)
    assert torch.equal(rebuilt.logits, expected)


def test_return_dict_false_gives_a_tuple_of_tensors():
    model = training_model()
    ids = tiny_ids(model.config)
    loss, logits, *_ = model(ids, labels=ids, return_dict=False)
    assert torch.equal(logits, model(ids).logits) and loss.requires_grad


def test_gradients_flow_through_logits_beside_the_loss():
    found = []
    for chunk_bytes in (0, THREE_ROWS):
        model = training_model(tie_word_embeddings=True)
        model.config.loss_chunk_bytes = chunk_bytes
        ids = tiny_ids(model.config)
        outputs = model(ids, labels=ids)
        (outputs.loss + outputs.logits.softmax(-1).square().sum()).backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in found[0].items():
        # The order of additions differs in float32, and all layers pass it on.
        bound = 1e-5 * gradient.abs().max().item() + 1e-12
        torch.testing.assert_close(found[1][name], gradient, atol=bound, rtol=0)


def test_a_first_read_without_gradients_leaves_them_to_a_later_one():
    outputs, _, _ = outputs_and_logits()
    with torch.no_grad():
        outputs.logits.argmax(-1)
    assert outputs.logits.requires_grad
    model = training_model()
    ids = tiny_ids(model.config)
    with torch.no_grad():
        outputs = model(ids, labels=ids)
    assert not outputs.loss.requires_grad and not outputs.logits.requires_grad


def test_logits_read_after_autocast_are_those_of_autocast():
    model = training_model()
    ids = tiny_ids(model.config)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs, expected = model(ids, labels=ids), model(ids).logits
    assert dict(outputs.items())["logits"].dtype == torch.bfloat16
    assert outputs.logits.dtype == torch.bfloat16 and torch.equal(outputs.logits, expected)


def test_accelerate_turns_deferred_logits_into_float32_like_others():
    model = training_model().to(torch.bfloat16)
    ids = tiny_ids(model.config)
    expected = convert_outputs_to_fp32(model)(ids).logits
    outputs = convert_outputs_to_fp32(model)(ids, labels=ids)
    assert outputs.logits.dtype == expected.dtype == torch.float32 and torch.equal(outputs.logits, expected)


def test_reading_after_the_optimizers_step_says_what_to_do():
    model = training_model()
    optimizer = torch.optim.AdamW(model.parameters())
    ids = tiny_ids(model.config)
    read, unread = model(ids, labels=ids), model(ids, labels=ids)
    before = read.logits
    unread.loss.backward()
    assert torch.equal(model(ids, labels=ids).logits, before), "backward changes nothing yet"
    optimizer.step()
    assert read.logits is before
    with pytest.raises(RuntimeError, match=r"read them before the optimizer's step, or set config.loss_chunk_bytes=0"):
        unread.logits  # noqa: B018


def test_pickling_computes_the_logits():
    model = training_model()
    ids = tiny_ids(model.config)
    with torch.no_grad():
        outputs = model(ids, labels=ids, use_cache=False)
    assert torch.equal(pickle.loads(pickle.dumps(outputs)).logits, outputs.logits)


def test_repr_names_the_logits_without_their_values():
    outputs, _, _ = outputs_and_logits()
    assert re.search(r"^DeepseekMoeDeferredOutput\(.*logits=DeferredLogits\(dtype=torch.float32\)", repr(outputs))


@pytest.mark.filterwarnings("ignore:find_unused_parameters=True was specified")
@pytest.mark.parametrize("find_unused", [False, True], ids=["all used", "find_unused_parameters"])
def test_a_step_under_ddp_has_the_gradients_of_one_without(find_unused, tmp_path):
    expected = training_model()
    ids = tiny_ids(expected.config)
    expected(ids, labels=ids).loss.backward()
    model = training_model()

    def step(wrapped) -> None:
        outputs = wrapped(ids, labels=ids)
        assert not is_computed(dict(outputs.items())["logits"])
        outputs.loss.backward()

    under_ddp(tmp_path, model, step, find_unused_parameters=find_unused)
    for parameter, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad)
