"""The loss in chunks against transformers' own on whole logits: value, gradients, refusals.

In float32 both differ in the order of additions only: 1e-6 of the largest entry, as in test_training. Half precision
is held against float64, where the chunks may be no further off than whole logits are.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from modeling_deepseek_moe.chunked_loss import ChunkedLossMixin, is_plain_head

THREE_ROWS = 3 * 96 * 4  # bytes of float32 logits
BATCH, LENGTH, WIDTH, VOCABULARY = 2, 30, 16, 96


class Head(ChunkedLossMixin, nn.Module):
    """The part of a causal language model behind the hidden states."""

    def __init__(self, vocab_size: int = VOCABULARY, width: int = WIDTH, chunk_bytes: int = THREE_ROWS):
        super().__init__()
        self.lm_head = nn.Linear(width, vocab_size, bias=False)
        nn.init.normal_(self.lm_head.weight)
        self.config = SimpleNamespace(loss_chunk_bytes=chunk_bytes, vocab_size=vocab_size)
        self.loss_function = ForCausalLMLoss


def head_and_inputs(vocab_size: int = VOCABULARY, batch: int = BATCH, length: int = LENGTH, width: int = WIDTH):
    """A head, hidden states that need a gradient, and labels of which some are ignored."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = Head(vocab_size, width)
        hidden_states = torch.randn(batch, length, width, requires_grad=True)
        labels = torch.randint(vocab_size, (batch, length))
        labels[torch.rand(batch, length) < 0.3] = -100
    return head, hidden_states, labels


def loss_and_gradients(head, hidden_states, labels, chunk_bytes: int, scale: float = 1.0, **kwargs):
    head.config.loss_chunk_bytes = chunk_bytes
    logits, loss = head.logits_and_loss(hidden_states, labels, **kwargs)
    assert isinstance(logits, torch.Tensor) is (chunk_bytes == 0), "chunks where asked for, and nowhere else"
    return loss, torch.autograd.grad(loss * scale, (hidden_states, head.lm_head.weight))


def assert_equal_to_rounding(actual, expected, relative: float = 1e-6) -> None:
    (loss, gradients), (expected_loss, expected_gradients) = actual, expected
    assert loss.dtype == expected_loss.dtype == torch.float32 and loss.shape == expected_loss.shape
    torch.testing.assert_close(loss, expected_loss, rtol=relative, atol=0, equal_nan=True)
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        assert gradient.dtype == other.dtype
        torch.testing.assert_close(gradient, other, rtol=0, atol=relative * other.abs().max().item())


@pytest.mark.parametrize("chunk_bytes", [1, THREE_ROWS, 17 * 96 * 4], ids=["1 row", "3 rows", "17 rows"])
@pytest.mark.parametrize("items", [None, 7, torch.tensor(50), torch.tensor([50])], ids=["mean", "int", "0-d", "1-d"])
def test_loss_and_gradients_are_those_of_whole_logits(items, chunk_bytes):
    case = head_and_inputs()
    expected = loss_and_gradients(*case, 0, num_items_in_batch=items)
    assert_equal_to_rounding(loss_and_gradients(*case, chunk_bytes, num_items_in_batch=items), expected)


@pytest.mark.parametrize("items", [None, 5], ids=["mean", "num_items"])
def test_without_any_target_the_loss_is_what_transformers_gives_and_gradients_are_zero(items):
    head, hidden_states, labels = head_and_inputs()
    case = (head, hidden_states, torch.full_like(labels, -100))
    chunked = loss_and_gradients(*case, THREE_ROWS, num_items_in_batch=items)
    assert_equal_to_rounding(chunked, loss_and_gradients(*case, 0, num_items_in_batch=items))
    assert chunked[0].isnan() if items is None else chunked[0] == 0
    assert not any(gradient.any() for gradient in chunked[1])


def test_logits_whose_exponentials_overflow_give_a_finite_loss():
    head, hidden_states, labels = head_and_inputs()
    nn.init.normal_(head.lm_head.weight, std=100.0)
    expected = loss_and_gradients(head, hidden_states, labels, 0)
    assert expected[0].isfinite() and expected[0] > 89, "exp(89) is beyond float32"
    # Logits of a thousand are rounded to 6e-5, and their exponentials differ by that share.
    assert_equal_to_rounding(loss_and_gradients(head, hidden_states, labels, THREE_ROWS), expected, relative=6e-5)


def test_shift_labels_and_another_ignore_index_are_read_as_transformers_does():
    head, hidden_states, labels = head_and_inputs()
    options = {"shift_labels": labels.masked_fill(labels == -100, 3), "ignore_index": 3}
    expected = loss_and_gradients(head, hidden_states, None, 0, **options)
    assert_equal_to_rounding(loss_and_gradients(head, hidden_states, None, THREE_ROWS, **options), expected)


def test_labels_that_do_not_fit_are_refused_in_transformers_words():
    head, hidden_states, labels = head_and_inputs()
    head.config.loss_chunk_bytes = THREE_ROWS
    with pytest.raises(ValueError, match="Expected input batch_size"):
        head.logits_and_loss(hidden_states, labels[:, 1:])
    for chunk_bytes in (0, THREE_ROWS):
        head.config.loss_chunk_bytes = chunk_bytes
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            head.logits_and_loss(hidden_states, labels.clamp_min(VOCABULARY))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_is_as_close_to_float64_as_whole_logits_are(dtype):
    """Root mean square errors. Both round the logits and their gradient, but the latter before or after the divisor.

    So the errors are of one size, not equal: within a tenth of each other in practice.
    """
    head, hidden_states, labels = head_and_inputs(vocab_size=512, length=150, width=64)
    nn.init.normal_(head.lm_head.weight, std=0.1)
    head, hidden_states = head.to(dtype), hidden_states.detach().to(dtype).requires_grad_()
    states, weight = (tensor.detach().double().requires_grad_() for tensor in (hidden_states, head.lm_head.weight))
    exact_loss = F.cross_entropy((states @ weight.T)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    exact = (exact_loss, *torch.autograd.grad(exact_loss * 64, (states, weight)))

    errors = {}
    for chunk_bytes in (0, 10 * 512 * 4):
        # Scaled, so that float16 gradients do not vanish.
        loss, gradients = loss_and_gradients(head, hidden_states, labels, chunk_bytes, scale=64)
        found = (loss, *gradients)
        errors[chunk_bytes] = [(a.double() - b).norm() / b.norm() for a, b in zip(found, exact, strict=True)]
    whole, chunked = errors.values()
    assert chunked[0] < 1e-4 and whole[0] < 1e-4
    for of_chunks, of_whole in zip(chunked[1:], whole[1:], strict=True):
        assert of_chunks < 1.2 * of_whole, (chunked, whole)


def test_under_autocast_the_gradients_are_those_of_whole_logits():
    """bf16 products in both: one unit of bf16's eight bits, as they are scaled by the divisor before or after."""
    case = head_and_inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = loss_and_gradients(*case, 0)
        chunked = loss_and_gradients(*case, THREE_ROWS)
    torch.testing.assert_close(chunked[0], expected[0], rtol=1e-6, atol=0)
    assert_equal_to_rounding((expected[0], chunked[1]), expected, 2**-7)
    in_float32 = loss_and_gradients(*case, THREE_ROWS)
    assert not torch.equal(in_float32[0], chunked[0]), "autocast must act on the chunks"


@pytest.mark.parametrize("scale", [65536.0, 0.125])
def test_gradients_scale_exactly_with_the_loss(scale):
    case = head_and_inputs()
    _, plain = loss_and_gradients(*case, THREE_ROWS)
    _, scaled = loss_and_gradients(*case, THREE_ROWS, scale=scale)
    assert all(torch.equal(a, b * scale) for a, b in zip(scaled, plain, strict=True))


def test_a_retained_graph_gives_the_same_gradients_again_in_the_precision_of_its_forward():
    head, hidden_states, labels = head_and_inputs()
    _, loss = head.logits_and_loss(hidden_states, labels)
    inputs = (hidden_states, head.lm_head.weight)
    first = torch.autograd.grad(loss * 3, inputs, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        second = torch.autograd.grad(loss * 3, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss * 3, inputs)


def test_a_second_derivative_is_refused():
    head, hidden_states, labels = head_and_inputs()
    _, loss = head.logits_and_loss(hidden_states, labels)
    with pytest.raises(RuntimeError, match="no second derivative: set config.loss_chunk_bytes=0"):
        torch.autograd.grad(loss, hidden_states, create_graph=True)
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda states: head.logits_and_loss(states, labels)[1])(hidden_states)


class Sharded(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(0), torch.zeros(96 * 32), Sharded(torch.zeros(96, 32))],
    ids=["empty, as in ZeRO-3", "flat, as in FSDP", "a subclass, as DTensor"],
)
def test_a_head_whose_weight_is_elsewhere_is_not_plain(weight):
    head = nn.Linear(32, 96, bias=False)
    assert is_plain_head(head)
    head.weight = nn.Parameter(weight)
    assert not is_plain_head(head)
