"""Training through transformers: Trainer, checkpointing, autocast, accumulation, and what an optimizer may touch.

Float32 throughout unless a test says otherwise. Gradients of one computation done in two orders are compared relative
to their largest entry: 1e-6 where only the order of additions differs, 1e-5 where the kernel differs.
"""

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_config, tiny_ids, tiny_model, v1_config, v2_config, v3_config
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

LINEAGES = ["v1", "v2", "v3"]
# Coefficients large enough that every loss is a visible part of the sum.
LOSSES = {"v1": {"aux_loss_alpha": 0.5}, "v2": {"aux_loss_alpha": 0.5}}
LOSSES["v3"] = {"aux_loss_alpha": 0.5, "mtp_loss_weight": 0.3}


def training_model(lineage: str, **overrides):
    return tiny_model(tiny_config(lineage, **{**LOSSES[lineage], **overrides})).train()


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_gradients_close(actual: dict, expected: dict, relative: float) -> None:
    assert actual.keys() == expected.keys() and expected
    for name, gradient in expected.items():
        bound = relative * gradient.abs().max().item() + 1e-12
        torch.testing.assert_close(actual[name], gradient, atol=bound, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def rows_of(ids: torch.Tensor) -> list[dict]:
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer_of(model, ids: torch.Tensor, folder, **options) -> Trainer:
    defaults = {"report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "logging_steps": 1}
    arguments = TrainingArguments(output_dir=str(folder), **{**defaults, **options})
    return Trainer(model=model, args=arguments, train_dataset=rows_of(ids))


@pytest.mark.parametrize("lineage", LINEAGES)
def test_trainer_lowers_the_loss_and_its_output_loads_with_the_auto_class(lineage, tmp_path):
    model = training_model(lineage, aux_loss_alpha=0.001)
    ids = tiny_ids(model.config, batch=4, length=16)
    options = {
        "max_steps": 15,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
    }
    trainer = trainer_of(model, ids, tmp_path, **options)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0], losses
    trainer.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert type(loaded) is type(model)
    for (name, saved), (other, read) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert name == other and torch.equal(saved, read), name
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize("lineage", ["v1", "v3"])
def test_trainer_resumes_from_its_checkpoint_to_the_same_weights(lineage, tmp_path):
    options = {"per_device_train_batch_size": 2, "max_steps": 4, "learning_rate": 1e-2, "save_strategy": "steps"}
    options |= {"save_steps": 2, "lr_scheduler_type": "constant"}
    ids = tiny_ids(tiny_config(lineage), batch=8, length=12)
    straight = trainer_of(training_model(lineage), ids, tmp_path, **options)
    straight.train()
    resumed = trainer_of(training_model(lineage), ids, tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, tensor in straight.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], tensor, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("lineage", LINEAGES)
def test_gradient_checkpointing_changes_no_loss_and_no_gradient(lineage, reentrant):
    ids = tiny_ids(tiny_config(lineage))
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0
    results = []
    for checkpointed in (False, True):
        model = training_model(lineage)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        outputs = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
        outputs.loss.backward()
        losses = [outputs.loss, outputs.aux_loss] + ([outputs.mtp_loss] if lineage == "v3" else [])
        results.append((torch.stack(losses), gradients(model)))
    (plain_losses, plain), (losses, checkpointed) = results
    torch.testing.assert_close(losses, plain_losses, rtol=1e-6, atol=1e-6)
    assert len(plain) == len(list(model.parameters())), "every parameter takes part"
    assert_gradients_close(checkpointed, plain, 1e-6)


@pytest.mark.parametrize("lineage", LINEAGES)
def test_bf16_autocast_trains_and_keeps_float32_weights_gradients_and_routing(lineage):
    model = training_model(lineage, aux_loss_alpha=0.001)
    ids = tiny_ids(model.config, batch=4, length=16)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    routed = []
    gate = model.model.layers[1].mlp.gate
    gate.register_forward_hook(lambda module, args, output: routed.append(output[:2]))
    losses = []
    for _ in range(12):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = model(ids, labels=ids)
        outputs.loss.backward()
        assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(outputs.loss.item())
    assert outputs.logits.dtype == torch.bfloat16
    assert all(tensor.dtype == torch.float32 for output in routed for tensor in output)
    assert losses[-1] < 0.6 * losses[0], losses


@pytest.mark.parametrize("lineage", LINEAGES)
def test_autocast_gradients_follow_the_float32_ones(lineage):
    """bf16 keeps 8 bits: a gradient accumulates relative errors of a few per cent over three layers."""
    found = {}
    for autocast in (False, True):
        model = training_model(lineage)
        ids = tiny_ids(model.config)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = model(ids, labels=ids).loss
        loss.backward()
        found[autocast] = gradients(model)
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.o_proj.weight"):
        cosine = F.cosine_similarity(found[True][name].flatten(), found[False][name].flatten(), dim=0)
        assert cosine > 0.97, (name, cosine.item())


@pytest.mark.parametrize("seq_aux", [True, False], ids=["per sequence", "per batch"])
@pytest.mark.parametrize("lineage", LINEAGES)
def test_four_accumulated_calls_equal_one_call_on_the_batch(lineage, seq_aux):
    """Sequences of equal length. Balance counted over the batch is another loss if the batch is cut, so it is off."""
    model = training_model(lineage, seq_aux=seq_aux, **({} if seq_aux or lineage == "v3" else {"aux_loss_alpha": 0.0}))
    ids = tiny_ids(model.config, batch=4, length=12)
    items = (ids.shape[1] - 1) * len(ids)
    whole = model(ids, labels=ids, num_items_in_batch=torch.tensor(items))
    whole.loss.backward()
    expected = gradients(model)
    model.zero_grad()
    total = 0.0
    for row in ids:
        part = model(row.unsqueeze(0), labels=row.unsqueeze(0), num_items_in_batch=torch.tensor(items))
        part.loss.backward()
        total += part.loss.item()
    assert total == pytest.approx(whole.loss.item(), rel=1e-6)
    assert_gradients_close(gradients(model), expected, 1e-5)
    unscaled = model(ids, labels=ids)
    if lineage != "v3":
        # The mean over all predicted tokens is the sum over the number of items.
        assert unscaled.loss.item() == pytest.approx(whole.loss.item(), rel=1e-6)


@pytest.mark.parametrize("lineage", LINEAGES)
def test_trainer_accumulation_1x4_takes_the_step_of_4x1(lineage, tmp_path):
    found = []
    for batch_size, steps in ((4, 1), (1, 4)):
        model = training_model(lineage)
        ids = tiny_ids(model.config, batch=4, length=12)
        options = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": steps, "max_steps": 1}
        trainer = trainer_of(model, ids, tmp_path, optim="sgd", learning_rate=0.1, max_grad_norm=1e9, **options)
        trainer.train()
        found.append((trainer.state.log_history[0], model.state_dict()))
    (whole_log, whole), (parts_log, parts) = found
    assert parts_log["loss"] == pytest.approx(whole_log["loss"], rel=1e-5)
    assert parts_log["grad_norm"] == pytest.approx(whole_log["grad_norm"], rel=1e-5)
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("scale", [1.0, 1024.0, 0.125], ids=["1", "1024", "1/8"])
@pytest.mark.parametrize("lineage", LINEAGES)
def test_t11_the_gradient_of_the_balance_loss_scales_with_the_loss(lineage, scale):
    """DeepSeek's own code injects it unscaled. Powers of two scale exactly, up to sums that underflow nowhere."""
    ids = tiny_ids(tiny_config(lineage))
    name = "model.layers.2.mlp.gate.weight"
    found = {}
    for alpha in (0.0, 0.5):
        for factor in (1.0, scale):
            model = training_model(lineage, aux_loss_alpha=alpha)
            (model(ids, labels=ids).loss * factor).backward()
            found[alpha, factor] = model.get_parameter(name).grad
    share = found[0.5, 1.0] - found[0.0, 1.0]
    assert share.abs().max() > 1e-3, "the balance loss must have a visible gradient"
    assert torch.equal(found[0.5, scale], found[0.5, 1.0] * scale)
    scaled_share = found[0.5, scale] - found[0.0, scale]
    torch.testing.assert_close(scaled_share, share * scale, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("lineage", LINEAGES)
def test_without_a_coefficient_there_is_no_balance_loss_and_the_loss_is_the_language_models(lineage):
    model = training_model(lineage, aux_loss_alpha=0.0, mtp_loss_weight=0.0)
    ids = tiny_ids(model.config)
    labels = ids.clone()
    labels[0, :5] = -100
    outputs = model(ids, labels=labels)
    assert outputs.aux_loss is None and outputs.mtp_loss is None
    plain = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(outputs.loss, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("lineage", LINEAGES)
def test_the_loss_in_training_is_the_sum_of_its_parts_and_in_evaluation_the_plain_one(lineage):
    model = training_model(lineage)
    ids = tiny_ids(model.config)
    outputs = model(ids, labels=ids)
    plain = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    mtp = 0.3 * outputs.mtp_loss if lineage == "v3" else 0.0
    torch.testing.assert_close(outputs.loss, plain + outputs.aux_loss + mtp)
    evaluated = model.eval()(ids, labels=ids)
    assert evaluated.aux_loss is None and evaluated.mtp_loss is None
    torch.testing.assert_close(evaluated.loss, plain)
    assert model.train()(ids).loss is None


@pytest.mark.parametrize("lineage", LINEAGES)
def test_t31_every_layer_returns_bfloat16_in_bfloat16_training(lineage):
    model = training_model(lineage).to(torch.bfloat16)
    ids = tiny_ids(model.config)
    dtypes = {}

    def remember(name):
        def hook(module, args, output):
            dtypes[name] = (output[0] if isinstance(output, tuple) else output).dtype

        return hook

    for name, module in model.named_modules():
        if name.split(".")[-1] in ("self_attn", "mlp", "experts", "shared_experts") or name.split(".")[-1].isdigit():
            module.register_forward_hook(remember(name))
    outputs = model(ids, labels=ids)
    outputs.loss.backward()
    assert len(dtypes) >= 3 * len(model.model.layers)
    assert set(dtypes.values()) == {torch.bfloat16}, dtypes
    assert outputs.loss.dtype == outputs.aux_loss.dtype == torch.float32
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("weight", [0.0, 0.3], ids=["frozen", "trained"])
def test_trainer_moves_the_mtp_module_only_when_its_loss_has_a_weight(weight, tmp_path):
    model = training_model("v3", mtp_loss_weight=weight)
    before = {name: p.clone() for name, p in model.named_parameters()}
    ids = tiny_ids(model.config, batch=4)
    trainer_of(model, ids, tmp_path, max_steps=1, per_device_train_batch_size=4, weight_decay=0.1).train()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    module = {name for name in before if name.startswith("model.layers.3.")}
    assert changed & module == (module if weight else set())
    assert before.keys() - module <= changed


@pytest.mark.parametrize("lineage", LINEAGES)
def test_tied_embeddings_train_as_one_matrix_and_load_tied(lineage, tmp_path):
    model = training_model(lineage, tie_word_embeddings=True)
    embedding = model.model.embed_tokens.weight
    assert model.lm_head.weight is embedding
    ids = tiny_ids(model.config, batch=4)
    model(ids, labels=ids).loss.backward()
    untied = training_model(lineage, tie_word_embeddings=False)
    untied.load_state_dict(model.state_dict())
    untied(ids, labels=ids).loss.backward()
    both = untied.model.embed_tokens.weight.grad + untied.lm_head.weight.grad
    torch.testing.assert_close(embedding.grad, both, rtol=1e-5, atol=1e-6)
    trainer_of(model, ids, tmp_path, max_steps=1, per_device_train_batch_size=4).train()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("lineage", LINEAGES)
def test_resized_embeddings_train_save_and_load(lineage, tied, tmp_path):
    model = training_model(lineage, tie_word_embeddings=tied)
    old = model.config.vocab_size
    before = model.get_input_embeddings().weight.detach().clone()
    model.resize_token_embeddings(old + 5)
    assert model.config.vocab_size == model.lm_head.out_features == old + 5
    assert torch.equal(model.get_input_embeddings().weight[:old], before)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied
    ids = tiny_ids(model.config)
    ids[:, 3] = old + 4
    outputs = model(ids, labels=ids)
    outputs.loss.backward()
    assert outputs.logits.shape[-1] == old + 5
    assert model.get_input_embeddings().weight.grad[old + 4].abs().sum() > 0
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


def test_a_fresh_model_uses_sorted_mm():
    model = training_model("v3")
    assert model.config._experts_implementation == "sorted_mm"
    assert model.get_experts_implementation() == {"": "sorted_mm"}


@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm", "sorted_mm"])
@pytest.mark.parametrize("lineage", LINEAGES)
def test_expert_implementations_agree_with_the_eager_one_in_outputs_and_all_gradients(lineage, implementation):
    ids = tiny_ids(tiny_config(lineage))
    found = {}
    for name in ("eager", implementation):
        model = training_model(lineage)
        model.set_experts_implementation(name)
        outputs = model(ids, labels=ids)
        outputs.loss.backward()
        found[name] = outputs, gradients(model)
    (eager, eager_gradients), (fast, fast_gradients) = found["eager"], found[implementation]
    torch.testing.assert_close(fast.logits, eager.logits, atol=2e-5, rtol=0)
    torch.testing.assert_close(fast.loss, eager.loss, atol=1e-6, rtol=1e-6)
    assert_gradients_close(fast_gradients, eager_gradients, 1e-5)


@pytest.mark.parametrize("config", [v1_config, v2_config, v3_config], ids=LINEAGES)
def test_an_expert_no_token_chose_gets_a_zero_gradient_and_no_nan(config):
    model = tiny_model(config(n_routed_experts=32, aux_loss_alpha=0.0)).train()
    ids = tiny_ids(model.config, batch=1, length=3)
    model(ids, labels=ids).loss.backward()
    gradient = model.model.layers[2].mlp.experts.down_proj.grad
    used = gradient.flatten(1).abs().sum(1) > 0
    assert torch.isfinite(gradient).all() and used.any() and not used.all()
