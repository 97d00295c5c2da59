"""A slow, literal reading of the papers (FACTS 1-3) in float64: one token, one head, one expert at a time.

Takes a DeepSeek `config.json` as a dict and tensors under DeepSeek's names. It shares no code with the package and is
itself held against the golden numbers of DeepSeek's own programs, so it may speak for configurations they lack.
"""

import math

import torch


def reference_logits(config: dict, tensors: dict[str, torch.Tensor], input_ids: torch.Tensor) -> torch.Tensor:
    """Logits `[B, T, V]`, float64."""
    weights = {name: tensor.double() for name, tensor in tensors.items()}
    return torch.stack([_sequence_logits(config, weights, ids) for ids in input_ids.tolist()])


def _sequence_logits(config, weights, ids):
    states = weights["model.embed_tokens.weight"][ids]
    attend = _latent_attention if config.get("kv_lora_rank") else _plain_attention
    for layer in range(config["num_hidden_layers"]):
        part = {k.removeprefix(f"model.layers.{layer}."): v for k, v in weights.items() if f".layers.{layer}." in k}
        states = states + attend(config, part, _norm(states, part["input_layernorm.weight"], config["rms_norm_eps"]))
        normed = _norm(states, part["post_attention_layernorm.weight"], config["rms_norm_eps"])
        dense = layer < config.get("first_k_dense_replace", 0) or layer % config.get("moe_layer_freq", 1)
        states = states + (_mlp(part, "mlp", normed) if dense else _moe(config, part, normed))
    return _norm(states, weights["model.norm.weight"], config["rms_norm_eps"]) @ weights["lm_head.weight"].T


def _norm(x, weight, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def _linear(part, name, x):
    bias = part.get(f"{name}.bias")
    return x @ part[f"{name}.weight"].T + (0 if bias is None else bias)


def _mlp(part, prefix, x):
    gate = _linear(part, f"{prefix}.gate_proj", x)
    return _linear(part, f"{prefix}.down_proj", gate * torch.sigmoid(gate) * _linear(part, f"{prefix}.up_proj", x))


def _moe(config, part, x):
    rows = []
    for token in x:
        total = torch.zeros_like(token)
        if config.get("n_shared_experts"):
            total = total + _mlp(part, "mlp.shared_experts", token)
        for expert, weight in route(config, part, token).items():
            total = total + weight * _mlp(part, f"mlp.experts.{expert}", token)
        rows.append(total)
    return torch.stack(rows)


def route(config: dict, part: dict, token: torch.Tensor) -> dict[int, float]:
    """Chosen experts of one token and their weights (FACTS 8.3)."""
    logits = part["mlp.gate.weight"] @ token
    sigmoid = config.get("scoring_func", "softmax") == "sigmoid"
    scores = (torch.sigmoid(logits) if sigmoid else torch.softmax(logits, 0)).tolist()
    method, top_k = config.get("topk_method", "greedy"), config["num_experts_per_tok"]
    bias = part["mlp.gate.e_score_correction_bias"].tolist() if method == "noaux_tc" else [0.0] * len(scores)
    biased = [s + b for s, b in zip(scores, bias, strict=True)]
    allowed = set(range(len(scores)))
    if method != "greedy":
        size = len(scores) // config["n_group"]
        groups = [list(range(start, start + size)) for start in range(0, len(scores), size)]
        best = 2 if method == "noaux_tc" else 1
        ranked = sorted(groups, key=lambda group: -sum(sorted((biased[e] for e in group), reverse=True)[:best]))
        allowed = {expert for group in ranked[: config["topk_group"]] for expert in group}
    chosen = sorted(allowed, key=lambda expert: -biased[expert])[:top_k]
    weights = {expert: scores[expert] for expert in chosen}
    scale, total = config.get("routed_scaling_factor", 1.0), sum(weights.values())
    if sigmoid:
        divisor = total if config.get("norm_topk_prob") else 1.0
        return {expert: weight / divisor * scale for expert, weight in weights.items()}
    if config.get("norm_topk_prob") and top_k > 1:
        return {expert: weight / total for expert, weight in weights.items()}
    return {expert: weight * scale for expert, weight in weights.items()}


def _mscale(factor, mscale):
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def rotary_angles(config: dict, dim: int) -> tuple[list[float], float]:
    """Angle of each pair for position 1, and the factor on cos and sin (FACTS 2.5)."""
    theta, yarn = config.get("rope_theta", 10000.0), config.get("rope_scaling")
    plain = [theta ** (-2 * k / dim) for k in range(dim // 2)]
    if not yarn:
        return plain, 1.0

    def corr(rotations):
        return (
            dim
            * math.log(yarn["original_max_position_embeddings"] / (2 * math.pi * rotations))
            / (2 * math.log(theta))
        )

    low = max(math.floor(corr(yarn["beta_fast"])), 0)
    high = min(math.ceil(corr(yarn["beta_slow"])), dim - 1)
    high = high + 0.001 if low == high else high
    ramps = [min(max((k - low) / (high - low), 0.0), 1.0) for k in range(dim // 2)]
    angles = [a * (1 - ramp + ramp / yarn["factor"]) for a, ramp in zip(plain, ramps, strict=True)]
    ratio = _mscale(yarn["factor"], yarn.get("mscale", 1)) / _mscale(yarn["factor"], yarn.get("mscale_all_dim", 0))
    return angles, ratio


def _rotate(vector, position, angles, factor, interleaved):
    out, half = vector.clone(), len(vector) // 2
    for k, angle in enumerate(angles):
        a, b = (2 * k, 2 * k + 1) if interleaved else (k, k + half)
        cos, sin = math.cos(position * angle) * factor, math.sin(position * angle) * factor
        out[a], out[b] = vector[a] * cos - vector[b] * sin, vector[b] * cos + vector[a] * sin
    return out


def _attend(queries, keys, values, scale):
    rows = []
    for t in range(len(queries)):
        scores = torch.stack([queries[t] @ keys[j] for j in range(t + 1)]) * scale
        rows.append(torch.softmax(scores, 0) @ torch.stack(values[: t + 1]))
    return torch.stack(rows)


def _latent_attention(config, part, x):
    heads, nope = config["num_attention_heads"], config["qk_nope_head_dim"]
    rope, value, rank = config["qk_rope_head_dim"], config["v_head_dim"], config["kv_lora_rank"]
    angles, factor = rotary_angles(config, rope)
    if config.get("q_lora_rank"):
        compressed = _norm(_linear(part, "self_attn.q_a_proj", x), part["self_attn.q_a_layernorm.weight"], 1e-6)
        q = _linear(part, "self_attn.q_b_proj", compressed)
    else:
        q = _linear(part, "self_attn.q_proj", x)
    down = _linear(part, "self_attn.kv_a_proj_with_mqa", x)
    latent = _norm(down[:, :rank], part["self_attn.kv_a_layernorm.weight"], 1e-6)
    up = _linear(part, "self_attn.kv_b_proj", latent)
    k_rope = [_rotate(row[rank:], t, angles, factor, True) for t, row in enumerate(down)]
    yarn = config.get("rope_scaling") or {}
    temperature = _mscale(yarn["factor"], yarn["mscale_all_dim"]) if yarn.get("mscale_all_dim") else 1.0
    scale = (nope + rope) ** -0.5 * temperature**2
    outputs = []
    for head in range(heads):
        q_head = q[:, head * (nope + rope) : (head + 1) * (nope + rope)]
        up_head = up[:, head * (nope + value) : (head + 1) * (nope + value)]
        queries = [torch.cat((r[:nope], _rotate(r[nope:], t, angles, factor, True))) for t, r in enumerate(q_head)]
        keys = [torch.cat((row[:nope], k_rope[t])) for t, row in enumerate(up_head)]
        outputs.append(_attend(queries, keys, [row[nope:] for row in up_head], scale))
    return _linear(part, "self_attn.o_proj", torch.cat(outputs, dim=-1))


def _plain_attention(config, part, x):
    heads, kv_heads = config["num_attention_heads"], config.get("num_key_value_heads") or config["num_attention_heads"]
    dim = config["hidden_size"] // heads
    angles, factor = rotary_angles(config, dim)
    q, k, v = (_linear(part, f"self_attn.{name}_proj", x) for name in "qkv")
    outputs = []
    for head in range(heads):
        kv = head // (heads // kv_heads)
        own, shared = slice(head * dim, (head + 1) * dim), slice(kv * dim, (kv + 1) * dim)
        queries = [_rotate(row[own], t, angles, factor, False) for t, row in enumerate(q)]
        keys = [_rotate(row[shared], t, angles, factor, False) for t, row in enumerate(k)]
        outputs.append(_attend(queries, keys, [row[shared] for row in v], dim**-0.5))
    return _linear(part, "self_attn.o_proj", torch.cat(outputs, dim=-1))
