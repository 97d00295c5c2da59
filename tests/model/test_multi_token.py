"""Multi-token prediction against a plain reference written from FACTS 3.3 (equations 21 to 25 of the V3 paper).

The reference runs in float32 over the same weights with explicit matrix products, so losses agree to some float32
roundings (1e-5) and gradients to 1e-4 of their largest entry.
"""

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_ids, tiny_model, v3_config

LAMBDA = 0.3
LENGTH = 10


def mtp_config(depth: int = 1, **overrides):
    options = {"num_nextn_predict_layers": depth, "mtp_loss_weight": LAMBDA, "aux_loss_alpha": 0.0}
    return v3_config(**{**options, **overrides})


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rotate(x: torch.Tensor, positions: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """Neighbouring pairs as complex numbers, in DeepSeek's own way."""
    angles = positions[:, None] * frequencies
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(
        torch.ones_like(angles), angles
    )
    return torch.view_as_real(turned).flatten(-2)


def attention(w: dict, config, frequencies, x: torch.Tensor) -> torch.Tensor:
    """Expanded MLA of one sequence `[T, H]`."""
    length, heads = x.shape[0], config.num_attention_heads
    nope, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    positions = torch.arange(length).float()
    q = rms_norm(x @ w["self_attn.q_a_proj.weight"].T, w["self_attn.q_a_layernorm.weight"], 1e-6)
    q = (q @ w["self_attn.q_b_proj.weight"].T).view(length, heads, nope + rope).transpose(0, 1)
    q = torch.cat([q[..., :nope], rotate(q[..., nope:], positions, frequencies)], -1)
    kv = x @ w["self_attn.kv_a_proj_with_mqa.weight"].T
    latent = rms_norm(kv[:, : config.kv_lora_rank], w["self_attn.kv_a_layernorm.weight"], 1e-6)
    k_rope = rotate(kv[:, config.kv_lora_rank :], positions, frequencies)
    up = (latent @ w["self_attn.kv_b_proj.weight"].T).view(length, heads, nope + value).transpose(0, 1)
    k = torch.cat([up[..., :nope], k_rope.expand(heads, -1, -1)], -1)
    scores = q @ k.transpose(1, 2) * (nope + rope) ** -0.5
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
    mixed = (scores.softmax(-1) @ up[..., nope:]).transpose(0, 1).flatten(1)
    return mixed @ w["self_attn.o_proj.weight"].T


def experts(w: dict, config, x: torch.Tensor) -> torch.Tensor:
    """Sigmoid routing over all experts without groups, one token at a time, plus the shared experts."""

    def swiglu(token, gate, up, down):
        return (F.silu(token @ gate.T) * (token @ up.T)) @ down.T

    shared = swiglu(x, *(w[f"mlp.shared_experts.{part}_proj.weight"] for part in ("gate", "up", "down")))
    rows = []
    for token in x:
        scores = (token @ w["mlp.gate.weight"].T).sigmoid()
        chosen = (scores + w["mlp.gate.e_score_correction_bias"]).topk(config.num_experts_per_tok).indices.tolist()
        total = sum(scores[expert] for expert in chosen)
        row = 0
        for expert in chosen:
            gate, up = w["mlp.experts.gate_up_proj"][expert].chunk(2)
            weight = scores[expert] / total * config.routed_scaling_factor
            row = row + weight * swiglu(token, gate, up, w["mlp.experts.down_proj"][expert])
        rows.append(row)
    return shared + torch.stack(rows)


def reference_loss(model, ids: torch.Tensor, labels: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """The mean over depths of each module's mean cross-entropy; `hidden` is the main model's normed output."""
    config, weights = model.config, {**dict(model.named_parameters()), **dict(model.named_buffers())}
    frequencies = config.rope_parameters["rope_theta"] ** -(
        torch.arange(0, config.qk_rope_head_dim, 2) / config.qk_rope_head_dim
    )
    embedding, head, eps = weights["model.embed_tokens.weight"], weights["lm_head.weight"], config.rms_norm_eps
    losses = []
    states = list(hidden)
    for depth in range(1, config.num_nextn_predict_layers + 1):
        prefix = f"model.layers.{config.num_hidden_layers + depth - 1}."
        w = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
        terms = []
        for row in range(len(ids)):
            length = ids.shape[1] - depth
            ahead = rms_norm(embedding[ids[row, depth:]], w["enorm.weight"], eps)
            seen = rms_norm(states[row][:length], w["hnorm.weight"], eps)
            x = torch.cat([ahead, seen], -1) @ w["eh_proj.weight"].T
            x = x + attention(w, config, frequencies, rms_norm(x, w["input_layernorm.weight"], eps))
            x = x + experts(w, config, rms_norm(x, w["post_attention_layernorm.weight"], eps))
            states[row] = rms_norm(x, w["shared_head.norm.weight"], eps)
            log_probabilities = (states[row] @ head.T).log_softmax(-1)
            for position in range(length - 1):
                target = labels[row, position + depth + 1].item()
                if target != -100:
                    terms.append(-log_probabilities[position, target])
        losses.append(torch.stack(terms).mean())
    return torch.stack(losses).mean()


def reference_config(depth: int):
    """Without YaRN and groups, which have tests of their own, the reference stays short."""
    return mtp_config(depth, rope_scaling=None, n_group=1, topk_group=1)


@pytest.mark.parametrize("ignored", [False, True], ids=["all labels", "some ignored"])
@pytest.mark.parametrize("depth", [1, 2])
def test_t16_the_loss_and_its_gradients_equal_the_papers_formula(depth, ignored):
    config = reference_config(depth)
    model = tiny_model(config).train()
    ids = tiny_ids(config, length=LENGTH)
    labels = ids.clone()
    if ignored:
        labels[0, :4] = -100
        labels[1, 7] = -100
    outputs = model(ids, labels=labels, output_hidden_states=True)
    expected = reference_loss(model, ids, labels, outputs.hidden_states[-1])
    torch.testing.assert_close(outputs.mtp_loss, expected, atol=1e-5, rtol=1e-5)
    names, parameters = zip(*[pair for pair in model.named_parameters() if pair[1].requires_grad], strict=True)
    actual = torch.autograd.grad(outputs.mtp_loss, parameters, retain_graph=True, allow_unused=True)
    for name, ours, theirs in zip(
        names, actual, torch.autograd.grad(expected, parameters, allow_unused=True), strict=True
    ):
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            bound = 1e-4 * theirs.abs().max().item() + 1e-9
            torch.testing.assert_close(ours, theirs, atol=bound, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_loss_is_the_language_model_loss_plus_the_weighted_mtp_loss():
    config = mtp_config()
    model = tiny_model(config).train()
    ids = tiny_ids(config)
    outputs = model(ids, labels=ids)
    plain = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert outputs.aux_loss is None
    torch.testing.assert_close(outputs.loss, plain + LAMBDA * outputs.mtp_loss)


def test_t14_the_embedding_comes_first_and_the_papers_order_is_the_swapped_projection():
    """`M [e; h]` with released weights equals the paper's `M' [h; e]` with the column halves of M swapped."""
    config = mtp_config()
    model = tiny_model(config)
    layer = model.model.layers[config.num_hidden_layers]
    hidden, embeds = torch.randn(2, 2, 5, config.hidden_size, generator=torch.Generator().manual_seed(0))
    joined = []
    handle = layer.eh_proj.register_forward_hook(lambda module, args, output: joined.append((args[0], output)))
    arguments = model.model.layer_arguments(hidden, None, torch.arange(5).unsqueeze(0))
    layer(hidden, embeds, **arguments)
    handle.remove()
    ((inputs, output),) = joined
    e, h = layer.enorm(embeds), layer.hnorm(hidden)
    assert torch.equal(inputs, torch.cat([e, h], -1))
    for_embedding, for_hidden = layer.eh_proj.weight.chunk(2, dim=1)
    papers_weight = torch.cat([for_hidden, for_embedding], dim=1)
    torch.testing.assert_close(torch.cat([h, e], -1) @ papers_weight.T, output, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(torch.cat([h, e], -1) @ layer.eh_proj.weight.T, output, atol=0.1), "the order matters"


def test_t14_the_module_sees_the_state_after_the_final_norm():
    config = mtp_config()
    model = tiny_model(config).train()
    ids = tiny_ids(config)
    seen = []
    layer = model.model.layers[config.num_hidden_layers]
    layer.hnorm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(ids, labels=ids)
    with torch.no_grad():
        final = model.model(ids).last_hidden_state
    torch.testing.assert_close(seen[0], final[:, :-1])


@pytest.mark.parametrize("depth", [1, 2])
def test_module_k_sees_k_tokens_ahead_and_is_scored_on_the_next(depth):
    """Changing the last token can move only the label of the last prediction, never an input of a scored position."""
    config = mtp_config(depth)
    model = tiny_model(config).train()
    ids = tiny_ids(config, batch=1, length=LENGTH)
    losses = []
    for last in (5, 6):
        ids[0, -1] = last
        labels = ids.clone()
        labels[0, -1] = -100
        losses.append(model(ids, labels=labels).mtp_loss)
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("depth", [1, 2])
def test_main_logits_and_generation_do_not_know_of_the_modules(depth):
    model = tiny_model(mtp_config(depth))
    bare = tiny_model(mtp_config(0))
    bare.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if name in bare.state_dict()})
    ids = tiny_ids(model.config)
    with torch.no_grad():
        expected = bare(ids).logits
        assert torch.equal(model(ids).logits, expected)
        model.train()
        assert torch.equal(model(ids, labels=ids).logits, expected)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.eval().generate(ids, **options), bare.generate(ids, **options))


@pytest.mark.parametrize("depth", [1, 2])
def test_gradient_reaches_every_parameter_of_every_module(depth):
    config = mtp_config(depth)
    model = tiny_model(config).train()
    ids = tiny_ids(config, batch=4, length=32)
    outputs = model(ids, labels=ids)
    outputs.mtp_loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_without_a_weight_the_modules_are_frozen_and_idle():
    config = mtp_config(mtp_loss_weight=0.0)
    model = tiny_model(config).train()
    ids = tiny_ids(config)
    ran = []
    layer = model.model.layers[config.num_hidden_layers]
    layer.register_forward_hook(lambda *_: ran.append(True))
    outputs = model(ids, labels=ids)
    outputs.loss.backward()
    assert outputs.mtp_loss is None and not ran
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert all(p.grad is not None for n, p in model.named_parameters() if p.requires_grad)


def test_evaluation_reports_the_plain_loss():
    config = mtp_config(aux_loss_alpha=0.1)
    model = tiny_model(config)
    ids = tiny_ids(config)
    with torch.no_grad():
        outputs = model(ids, labels=ids)
    assert outputs.mtp_loss is None and outputs.aux_loss is None
    plain = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(outputs.loss, plain)


def test_the_balance_loss_of_the_modules_is_part_of_aux_loss():
    config = mtp_config(aux_loss_alpha=0.5)
    with_module = tiny_model(config).train()
    ids = tiny_ids(config)
    outputs = with_module(ids, labels=ids)
    main_only = with_module.model(ids).aux_loss
    # A balance loss is near alpha; the module adds its own.
    assert 0.5 * 0.8 < (outputs.aux_loss - main_only).item() < 0.5 * config.n_routed_experts
    plain = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(outputs.loss, plain + LAMBDA * outputs.mtp_loss + outputs.aux_loss)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_the_mtp_loss(side):
    config = mtp_config()
    model = tiny_model(config).train()
    ids = tiny_ids(config, batch=1, length=8)
    pad, mask, ignored = torch.full((1, 3), 7), torch.ones_like(ids), torch.full((1, 3), -100)
    labels = ids.clone()
    # The first two tokens have no real token two places before them to be predicted from.
    labels[:, :2] = -100
    alone = model(ids, labels=labels).mtp_loss
    order = 1 if side == "right" else -1
    padded_ids, attention_mask, padded_labels = (
        torch.cat([real, padding][::order], 1)
        for real, padding in ((ids, pad), (mask, mask[:, :3] * 0), (labels, ignored))
    )
    padded = model(padded_ids, attention_mask=attention_mask, labels=padded_labels).mtp_loss
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-5)


def test_inputs_embeds_give_the_same_mtp_loss_as_ids():
    config = mtp_config()
    model = tiny_model(config).train()
    ids = tiny_ids(config)
    from_embeds = model(inputs_embeds=model.get_input_embeddings()(ids), labels=ids).mtp_loss
    torch.testing.assert_close(from_embeds, model(ids, labels=ids).mtp_loss)


def test_packed_sequences_have_the_mtp_loss_of_the_sequences_alone():
    """No module predicts the tokens of the next document."""
    config = mtp_config()
    model = tiny_model(config).train()
    first, second = tiny_ids(config, batch=1, length=6), tiny_ids(config, batch=1, length=9, seed=1)
    items = torch.tensor(5 + 8)
    alone = sum(model(ids, labels=ids, num_items_in_batch=items).mtp_loss for ids in (first, second))
    labels = torch.cat([first, second], 1)
    labels[0, 6] = -100
    position_ids = torch.cat([torch.arange(6), torch.arange(9)]).unsqueeze(0)
    packed = model(
        torch.cat([first, second], 1),
        position_ids=position_ids,
        labels=labels,
        use_cache=False,
        num_items_in_batch=items,
    )
    torch.testing.assert_close(packed.mtp_loss, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length, items", [(1, 10), (2, 10), (2, None)], ids=["one of 10", "two of 10", "two"])
def test_sequences_too_short_for_a_module_add_nothing(length, items):
    config = mtp_config()
    model = tiny_model(config).train()
    ids = tiny_ids(config, length=length)
    outputs = model(ids, labels=ids, num_items_in_batch=None if items is None else torch.tensor(items))
    evaluated = model.eval()(ids, labels=ids, num_items_in_batch=None if items is None else torch.tensor(items))
    assert torch.isfinite(outputs.loss)
    torch.testing.assert_close(outputs.loss, evaluated.loss)
