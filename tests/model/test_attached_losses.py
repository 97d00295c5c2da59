"""Balance losses where another head computes the objective: the gradients of the model's own loss, counted once.

Gradients are float32 sums in another order: 1e-6 of the largest entry, as between any two graphs of the same sum.
"""

import warnings

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from one_rank import under_ddp
from peft import LoraConfig, get_peft_model
from tiny import tiny_config, tiny_ids, tiny_model
from tiny_trainer import padded_rows, trainer_of, training_model, whole_rows
from transformers import Trainer, TrainerCallback

from modeling_deepseek_moe import (
    DeepseekMoeForCausalLM,
    DeepseekMoeForSequenceClassification,
    DeepseekMoeForTokenClassification,
)

ROUNDING = 1e-6
ALPHAS = {"aux_loss_alpha": 0.5, "device_loss_alpha": 0.3, "communication_loss_alpha": 0.2}
IDLE = "mtp_loss_weight=0.3 has no part in this training"


@pytest.fixture(autouse=True)
def _no_accelerator_is_left():
    yield
    for state in (AcceleratorState, PartialState, GradientState):
        state._shared_state.clear()


def cross_entropy(logits, labels, **_):
    """A mean over targets."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def own_head(model, ids, labels, **inputs):
    """What a library does with the base model."""
    return cross_entropy(model.lm_head(model.model(ids, **inputs).last_hidden_state), labels)


def logits_only(model, ids, labels, **inputs):
    return cross_entropy(model(ids, **inputs).logits, labels)


def last_state(model, ids, labels, **inputs):
    """The base model's last state as the head's output hands it out."""
    return cross_entropy(model.lm_head(model(ids, output_hidden_states=True, **inputs).hidden_states[-1]), labels)


def loss_and_output(model, ids, labels, **inputs):
    """Its `aux_loss` is added once more, for the value."""
    outputs = model.model(ids, **inputs)
    return cross_entropy(model.lm_head(outputs.last_hidden_state), labels) + outputs.aux_loss


def own_sum(model, ids, labels, **inputs):
    """A caller that adds the losses itself."""
    losses = []
    hidden_states = model.model(ids, aux_losses=losses, **inputs).last_hidden_state
    return cross_entropy(model.lm_head(hidden_states), labels) + losses[0]


WAYS = {f.__name__: f for f in (own_head, logits_only, last_state, loss_and_output, own_sum)}


def gradients(model, loss, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Of one backward pass of `scale` times the loss, or of what is there already for None; divided by `scale`."""
    if loss is not None:
        model.zero_grad()
        (scale * loss).backward()
    return {name: p.grad / scale for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], relative: float = ROUNDING):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        bound = relative * max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(found[name], gradient, atol=bound, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def inputs_of(model, kind: str) -> dict[str, torch.Tensor]:
    ids = tiny_ids(model.config, batch=3)
    if kind == "padded":
        mask = torch.ones_like(ids)
        mask[0, 7:] = mask[2, 3:] = 0
        return {"ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    positions = torch.cat([torch.arange(5), torch.arange(7)]).expand(3, -1)
    return {"ids": ids, "position_ids": positions, "labels": ids.masked_fill(positions == 0, -100)}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["padded", "packed"])
@pytest.mark.parametrize("lineage", ["v1", "v2", "v3"])
def test_gradients_of_a_loss_computed_outside_are_those_of_the_models_own(lineage, kind, way):
    model = tiny_model(tiny_config(lineage, **(ALPHAS if lineage == "v2" else {"aux_loss_alpha": 0.5}))).train()
    inputs = inputs_of(model, kind)
    labels, ids = inputs.pop("labels"), inputs.pop("ids")
    expected = gradients(model, model(ids, labels=labels, **inputs).loss)
    found = gradients(model, WAYS[way](model, ids, labels, **inputs))
    assert_same(found, expected)
    model.eval()
    plain = gradients(model, cross_entropy(model(ids, **inputs).logits, labels))
    router = "model.layers.1.mlp.gate.weight"
    assert (expected[router] - plain[router]).abs().max() > 1e-3, "the balance loss is a visible part"


@pytest.mark.parametrize("model_class", [DeepseekMoeForSequenceClassification, DeepseekMoeForTokenClassification])
def test_a_classification_heads_logits_carry_it_too(model_class):
    config = tiny_config("v2", aux_loss_alpha=0.5, num_labels=3, pad_token_id=2)
    model = tiny_model(config, model_class=model_class).train()
    ids = tiny_ids(config).clamp_min(3)
    labels = ids[:, 0] % 3 if model_class is DeepseekMoeForSequenceClassification else ids % 3
    expected = gradients(model, model(ids, labels=labels).loss)
    outside = F.cross_entropy(model(ids).logits.flatten(0, -2), labels.flatten())
    assert_same(gradients(model, outside), expected)


def test_nothing_is_attached_without_gradients_in_evaluation_or_without_a_coefficient():
    model = tiny_model(tiny_config("v3", aux_loss_alpha=0.5)).train()
    ids = tiny_ids(model.config)
    with torch.no_grad():
        drawn = model.model(ids)
        model.generate(ids, max_new_tokens=2, do_sample=False, attention_mask=torch.ones_like(ids))
    assert drawn.last_hidden_state.grad_fn is None and drawn.aux_loss > 0
    assert model.eval().model(ids).aux_loss is None
    model.config.aux_loss_alpha = 0.0
    assert "Attached" not in model.train().model(ids).last_hidden_state.grad_fn.name()
    model.config.aux_loss_alpha = 0.5
    assert "Attached" in model.model(ids).last_hidden_state.grad_fn.name()


@pytest.mark.filterwarnings("ignore:.*activation_checkpointing:FutureWarning", f"ignore:{IDLE}")
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_activation_checkpointing_changes_nothing(reentrant):
    model = training_model()
    ids = tiny_ids(model.config)
    expected = gradients(model, own_head(model, ids, ids))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(gradients(model, own_head(model, ids, ids)), expected)


def stepped(rows, folder, **options) -> list[dict[str, torch.Tensor]]:
    """Gradients of each step of a Trainer that trains for one epoch."""
    model = training_model(mtp_loss_weight=0.0)
    trainer = trainer_of(model, rows, folder, max_grad_norm=0, learning_rate=0.0, num_train_epochs=1, **options)
    found = []

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, *args, **kwargs):
            found.append({name: gradient.clone() for name, gradient in gradients(model, None).items()})

    trainer.add_callback(Keep())
    trainer.train()
    return found


def mean_loss(outputs, labels, num_items_in_batch):
    """Of all micro-batches, as the Trainer asks."""
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


class SumsItself(Trainer):
    """Its loss is computed by a function."""

    def __init__(self, **options):
        super().__init__(compute_loss_func=mean_loss, **options)


def test_a_batch_cut_into_micro_batches_has_the_gradients_of_the_whole(tmp_path):
    """Six rows, four a step: two micro-batches, then the one that is left of the epoch."""
    rows = whole_rows(training_model(), 6)
    whole = stepped(rows, tmp_path, per_device_train_batch_size=4, label_smoothing_factor=0.1)
    cut = stepped(rows, tmp_path, gradient_accumulation_steps=2, label_smoothing_factor=0.1)
    for one, other in zip(whole, cut, strict=True):
        assert_same(other, one, 1e-5)
    assert len(whole) == 2


def test_the_gradients_of_a_trainer_that_computes_the_loss_are_those_of_one_that_does_not(tmp_path):
    rows = whole_rows(training_model(), 4)
    (expected,) = stepped(rows, tmp_path, gradient_accumulation_steps=2)
    (found,) = stepped(rows, tmp_path, gradient_accumulation_steps=2, trainer_class=SumsItself)
    assert_same(found, expected, 1e-5)


def test_the_loss_scale_of_float16_scales_the_balance_loss(tmp_path):
    """A Trainer makes its scaler on GPUs only; here it gets one."""
    found = []
    for scale in (1.0, 1024.0):
        model = training_model(mtp_loss_weight=0.0)
        trainer = trainer_of(model, whole_rows(model, 4), tmp_path, label_smoothing_factor=0.1)
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = 1
        ids = tiny_ids(model.config)
        trainer.training_step(model, {"input_ids": ids, "labels": ids})
        found.append({name: gradient / scale for name, gradient in gradients(model, None).items()})
    assert_same(found[1], found[0])


def test_float16_whose_scale_is_not_known_is_refused():
    model = training_model(mtp_loss_weight=0.0)
    ids = tiny_ids(model.config)
    with torch.autocast("cpu", dtype=torch.float16):
        with pytest.raises(
            ValueError, match="float16 outside of a Trainer, .*: train in bfloat16, set aux_loss_alpha"
        ):
            model.model(ids)
        assert torch.isfinite(model(ids, labels=ids).loss)


def test_an_accelerators_accumulation_divides_it():
    model = training_model(mtp_loss_weight=0.0)
    ids = tiny_ids(model.config)
    expected = gradients(model, own_head(model, ids, ids))
    accelerator = Accelerator(gradient_accumulation_steps=4, cpu=True)
    model.zero_grad()
    accelerator.backward(own_head(model, ids, ids))
    assert_same({name: 4 * gradient for name, gradient in gradients(model, None).items()}, expected)


def test_data_parallel_copies_are_refused_with_the_way_out():
    """nn.DataParallel needs several GPUs, so this makes the copy that it would make."""
    model = training_model(mtp_loss_weight=0.0)
    replica = model.model._replicate_for_data_parallel()
    replica.embed_tokens.weight = model.model.embed_tokens.weight
    with pytest.raises(RuntimeError, match="cannot be added .* under nn.DataParallel: .*torchrun"):
        replica(tiny_ids(model.config))


def test_an_objective_without_the_multi_token_loss_is_told_once_by_name():
    model = training_model()
    ids = tiny_ids(model.config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(ids, labels=ids).loss.backward()
        with torch.no_grad():
            model.model(ids)
        model.eval()(ids)
        training_model(mtp_loss_weight=0.0).model(ids)
    with pytest.warns(UserWarning, match=f"^{IDLE}.*or set mtp_loss_weight=0"):
        own_head(model.train(), ids, ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own_head(model, ids, ids)
    head = tiny_model(tiny_config("v3", mtp_loss_weight=0.3), model_class=DeepseekMoeForSequenceClassification)
    with pytest.warns(UserWarning, match=IDLE):
        head.train()(ids[:1], labels=ids[:1, 0] % 2)


def idle_adapters(model, **config):
    """Stock LoRA by module names, which also takes those of the multi-token layer, whose loss has no weight."""
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_a_proj", "o_proj"], **config)).train()


def test_ddp_goes_on_past_adapters_on_an_idle_multi_token_layer(tmp_path):
    model = tiny_model(tiny_config("v3"))
    expected = {}
    adapted = idle_adapters(model)
    rows = [tiny_ids(model.config, seed=seed) for seed in range(3)]
    for ids in rows:
        adapted(input_ids=ids, labels=ids).loss.backward()
    expected = gradients(adapted, None)
    assert not any("layers.3." in name for name in expected)
    adapted.zero_grad()

    def steps(wrapped):
        for ids in rows:
            wrapped(input_ids=ids, labels=ids).loss.backward()
        return gradients(adapted, None)

    found = under_ddp(tmp_path, adapted, steps)
    idle = {name: gradient for name, gradient in found.items() if "layers.3." in name}
    assert len(idle) == 4 and all((gradient == 0).all() for gradient in idle.values())
    assert_same({name: gradient for name, gradient in found.items() if name not in idle}, expected)

    # It is still there: in a checkpoint, and to draft.
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "saved")
    saved = DeepseekMoeForCausalLM.from_pretrained(tmp_path / "saved")
    kept = {name: p for name, p in merged.named_parameters() if "layers.3." in name}
    assert kept and all(torch.equal(saved.get_parameter(name), p) for name, p in kept.items())
    prompt = rows[0][:1]
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    drafted = saved.eval().generate(prompt, use_mtp=True, **options)
    assert torch.equal(drafted, saved.generate(prompt, **options))


@pytest.mark.filterwarnings(f"ignore:{IDLE}")
@pytest.mark.parametrize("kind", ["another head", "rows too short for it"])
def test_ddp_goes_on_past_a_multi_token_layer_whose_loss_a_pass_does_not_compute(kind, tmp_path):
    model = training_model()
    length = 12 if kind == "another head" else 2

    def steps(wrapped):
        for seed in range(3):
            ids = tiny_ids(model.config, length=length, seed=seed)
            labels = None if kind == "another head" else ids
            outputs = wrapped(ids, labels=labels)
            (cross_entropy(outputs.logits, ids) if labels is None else outputs.loss).backward()
        return gradients(model, None)

    found = under_ddp(tmp_path, model, steps)
    assert all((found[name] == 0).all() for name in found if "layers.3." in name)
    assert found["model.layers.2.mlp.gate.weight"].abs().max() > 0


def test_padding_has_no_part_in_what_is_attached():
    model = training_model(mtp_loss_weight=0.0)
    row = padded_rows(model, 2)[1]
    real = row["attention_mask"].bool()
    short = row["input_ids"][real][None]
    padded = {"attention_mask": row["attention_mask"][None]}
    labels = row["input_ids"].masked_fill(~real, -100)[None]
    expected = gradients(model, own_head(model, short, short))
    assert_same(gradients(model, own_head(model, row["input_ids"][None], labels, **padded)), expected, 1e-5)
