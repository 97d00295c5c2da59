"""Models that train with a loss in chunks: what is never allocated, what it equals, and when logits are whole."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_config, tiny_ids, tiny_model, v1_config
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Trainer, TrainingArguments
from transformers.loss.loss_utils import ForCausalLMLoss

from modeling_deepseek_moe.causal_lm_output import DeepseekMoeDeferredOutput

THREE_ROWS = 3 * 96 * 4  # bytes of float32 logits, at the tiny models' vocabulary of 96


class Allocations(TorchDispatchMode):
    """The number of elements of every new tensor, views and in-place results left out."""

    def __init__(self):
        super().__init__()
        self.sizes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given, made = (
            [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)] for tree in (args, result)
        )
        known = {tensor.untyped_storage().data_ptr() for tensor in given}
        self.sizes |= {tensor.numel() for tensor in made if tensor.untyped_storage().data_ptr() not in known}
        return result


def sizes_of_a_step(model, ids, labels, chunk_bytes: int) -> set[int]:
    model.config.loss_chunk_bytes = chunk_bytes
    with Allocations() as allocations:
        model(ids, labels=labels).loss.backward()
    return allocations.sizes


def test_a_training_step_never_holds_the_logits_of_all_tokens():
    """A vocabulary that divides no other size: a tensor with n rows of logits is known by its number of elements."""
    vocab_size = 1009
    model = tiny_model(tiny_config("v3", vocab_size=vocab_size, mtp_loss_weight=0.3)).train()
    ids = tiny_ids(model.config, length=20)

    def rows(sizes):
        return {size // vocab_size for size in sizes if size % vocab_size == 0 and size} - {model.config.hidden_size}

    assert {40, 36} <= rows(sizes_of_a_step(model, ids, ids, 0)), "38 and 34 have a target; MTP sees 36"
    assert max(rows(sizes_of_a_step(model, ids, ids, 8 * vocab_size * 4))) <= 8
    labels = ids.clone()
    labels[:, 4:] = -100
    # Six targets in three chunks of two, and the module's four.
    assert max(rows(sizes_of_a_step(model, ids, labels, 10**4))) == 2


def test_a_frozen_head_gets_no_gradient_and_costs_none():
    vocab_size = 1009
    model = tiny_model(v1_config(vocab_size=vocab_size)).train()
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"]))
    ids = tiny_ids(model.config)
    weight = vocab_size * model.config.hidden_size
    sizes = sizes_of_a_step(model, ids, ids, 2 * vocab_size * 4)
    assert weight not in sizes and max(size for size in sizes if size % vocab_size == 0) == 2 * vocab_size
    model.get_output_embeddings().weight.requires_grad_(True)
    assert weight in sizes_of_a_step(model, ids, ids, 2 * vocab_size * 4)


LOSSES = {"aux_loss_alpha": 0.5}


def step(model, chunk_bytes: int, ids, **inputs):
    """The output and gradients of one training step."""
    model.config.loss_chunk_bytes = chunk_bytes
    model.train().zero_grad()
    outputs = model(ids, **inputs)
    outputs.loss.backward()
    return outputs, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True}], ids=["untied", "tied"])
@pytest.mark.parametrize("lineage", ["v1", "v2", "v3"])
def test_a_models_losses_and_gradients_do_not_depend_on_chunks(lineage, options):
    """With padding, the balance losses, and the MTP module's, under checkpointing.

    The head's gradients agree to 1e-6; all layers behind it pass these roundings on and add their own.
    """
    mtp = {"mtp_loss_weight": 0.3} if lineage == "v3" else {}
    model = tiny_model(tiny_config(lineage, **LOSSES, **mtp, **options))
    model.gradient_checkpointing_enable()
    ids = tiny_ids(model.config)
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0
    inputs = {"attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100), "num_items_in_batch": 30}
    plain, expected = step(model, 0, ids, **inputs)
    chunked, gradients = step(model, THREE_ROWS, ids, **inputs)
    assert isinstance(chunked, DeepseekMoeDeferredOutput) and not isinstance(plain, DeepseekMoeDeferredOutput)
    for name in ("loss", "aux_loss") + (("mtp_loss",) if mtp else ()):
        torch.testing.assert_close(chunked[name], plain[name], rtol=1e-6, atol=0)
    assert gradients.keys() == expected.keys() and len(gradients) == len(list(model.parameters()))
    for name, gradient in expected.items():
        bound = 1e-5 * gradient.abs().max().item() + 1e-12
        torch.testing.assert_close(gradients[name], gradient, atol=bound, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


class HeadOfItsOwn(nn.Linear):
    pass


def replaced(model, head: nn.Module):
    model.set_output_embeddings(head)


def offloaded(model):
    model.lm_head.forward = model.lm_head.forward


HEADS = {
    "a bias": lambda model: replaced(model, nn.Linear(32, 96)),
    "a subclass": lambda model: replaced(model, HeadOfItsOwn(32, 96, bias=False)),
    "LoRA": lambda model: get_peft_model(model, LoraConfig(target_modules=["lm_head"])),
    "a parametrization": lambda model: nn.utils.parametrizations.weight_norm(model.lm_head),
    "a hook": lambda model: model.lm_head.register_forward_hook(lambda module, args, logits: logits),
    "a pre-hook": lambda model: model.lm_head.register_forward_pre_hook(lambda module, args: None),
    "a backward hook": lambda model: model.lm_head.register_full_backward_hook(lambda *_: None),
    "a forward of its own, as accelerate's offloading": offloaded,
    "a loss of the user's": lambda model: setattr(
        model, "loss_function", lambda *_, **given: ForCausalLMLoss(**given)
    ),
}


@pytest.mark.parametrize("change", HEADS.values(), ids=HEADS)
def test_logits_are_whole_where_the_head_is_more_than_a_product_or_the_loss_another(change):
    model = tiny_model(v1_config()).train()
    change(model)
    model.config.loss_chunk_bytes = THREE_ROWS
    ids = tiny_ids(model.config)
    outputs = model(ids, labels=ids)
    assert isinstance(dict(outputs.items())["logits"], torch.Tensor)
    outputs.loss.backward()


def test_a_loss_function_of_the_users_gets_what_it_always_got():
    model = tiny_model(v1_config(loss_chunk_bytes=THREE_ROWS, aux_loss_alpha=0.0)).train()
    model.loss_function = lambda logits, labels, vocab_size: logits.sum() * 0 + labels.sum() + vocab_size
    ids = tiny_ids(model.config)
    assert model(ids, labels=ids).loss == ids.sum() + 96


def test_a_compiled_training_step_is_one_graph_with_whole_logits():
    model = tiny_model(v1_config(loss_chunk_bytes=THREE_ROWS)).train()
    ids = tiny_ids(model.config)
    outputs = torch.compile(model, backend="eager", fullgraph=True)(ids, labels=ids, use_cache=False)
    assert isinstance(dict(outputs.items())["logits"], torch.Tensor)
    torch.testing.assert_close(outputs.loss, model(ids, labels=ids).loss)


@pytest.mark.parametrize("case", ["evaluation", "they fit", "0", "logits_to_keep"])
def test_logits_are_whole_in_evaluation_or_where_they_fit_in_one_chunk(case):
    ids = tiny_ids(v1_config())
    chunk_bytes = {"they fit": ids.numel() * 96 * 4, "0": 0}.get(case, THREE_ROWS)
    model = tiny_model(v1_config(loss_chunk_bytes=chunk_bytes)).train(case != "evaluation")
    options = {"logits_to_keep": 5, "shift_labels": ids[:, -5:].contiguous()} if case == "logits_to_keep" else {}
    outputs = model(ids, labels=ids, **options)
    is_whole = isinstance(dict(outputs.items())["logits"], torch.Tensor)
    assert is_whole is (case != "logits_to_keep"), "the last five positions, still more than one chunk"
    expected = ForCausalLMLoss(outputs.logits, ids, 96, shift_labels=options.get("shift_labels"))
    aux_loss = 0.0 if outputs.aux_loss is None else outputs.aux_loss
    torch.testing.assert_close(outputs.loss, expected + aux_loss, rtol=1e-6, atol=0)


def test_the_config_keeps_loss_chunk_bytes_and_refuses_a_negative_one(tmp_path):
    v1_config(loss_chunk_bytes=1234).save_pretrained(tmp_path)
    assert type(v1_config()).from_pretrained(tmp_path).loss_chunk_bytes == 1234
    with pytest.raises(ValueError, match=r"^loss_chunk_bytes=-1 must be a number of at least 0$"):
        v1_config(loss_chunk_bytes=-1)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")
def test_trainer_in_mixed_precision_takes_the_same_steps_with_chunks(tmp_path):
    """Autocast, accumulation, accelerate's conversion of outputs. Chunks leave out one rounding to bf16 (2^-9)."""
    first = tiny_model(tiny_config("v3", mtp_loss_weight=0.3))
    ids = tiny_ids(first.config, batch=8)
    losses = []
    for chunk_bytes in (0, THREE_ROWS):
        model = copy.deepcopy(first)
        model.config.loss_chunk_bytes = chunk_bytes
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=3,
            optim="sgd",
            learning_rate=0.1,
            bf16=True,
            gradient_checkpointing=True,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            logging_steps=1,
        )
        trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids])
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-6), "nothing is trained yet"
