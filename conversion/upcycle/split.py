"""The format `upcycle`: a dense SwiGLU checkpoint becomes a DeepSeekMoE one, its feed-forwards cut into experts.

The neurons of each feed-forward are dealt to shared and routed experts, values unchanged. Scores are a softmax over
logits so small that every expert scores 1/N, and `routed_scaling_factor` is the number N of routed experts, so every
chosen expert has the weight 1 whatever `num_experts_per_tok` is: with all experts active the model is the dense one.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch

from modeling_deepseek_moe import CheckpointError, DeepseekMoeConfig
from modeling_deepseek_moe.checkpoint_layout import expected_tensors, is_redundant

from ..engine.operations import Cast, Copy, difference
from ..engine.plan import Plan, Step, TensorSpec, shards_like_source
from ..engine.source import SourceCheckpoint
from .dense import ZERO_BIAS
from .neurons import group_neurons, router_rows

UPCYCLE = "upcycle"
# Size of the router's logits. Weights are off 1 by as much, and float32 tells scores apart that differ by 1e-7.
_SPREAD = 1e-6
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_KEPT_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "use_qk_norm",
    "kv_lora_rank",
    "q_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "rope_interleave",
    "rope_parameters",
    "max_position_embeddings",
    "hidden_act",
    "rms_norm_eps",
    "initializer_range",
    "attention_bias",
    "attention_dropout",
    "tie_word_embeddings",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


@dataclass(frozen=True)
class UpcycleOptions:
    """How a dense feed-forward is cut.

    Attributes:
        experts: routed experts of a layer.
        shared_experts: experts of the same width that serve every token.
        top_k: routed experts that serve one token.
        dense_layers: so many first layers stay as they are.
    """

    experts: int
    shared_experts: int
    top_k: int
    dense_layers: int = 0


@dataclass(frozen=True)
class SplitFeedForward:
    """Makes a router and its experts of a layer's gate, up and down projection and the norm in front of it.

    Outputs: the router, then gate, up and down projection of the shared experts, if any, and of each routed expert.
    """

    shared: int
    experts: int
    width: int
    dtype: torch.dtype

    def apply(self, gate, up, down, norm) -> tuple[torch.Tensor, ...]:
        if not torch.isfinite(gate).all():
            raise ValueError("holds values that are not finite")
        if not torch.isfinite(norm).all():
            raise ValueError("stands behind a norm that is not finite")
        gate = gate.to(self.dtype)
        order = group_neurons(gate, norm, self.shared, self.experts, self.width)
        parts = []
        for neurons in order.split(self._widths()):
            parts += [gate[neurons], up[neurons].to(self.dtype), down[:, neurons].to(self.dtype)]
        router = router_rows(gate[order[self.shared :]], norm, self.experts, _SPREAD)
        return router.to(self.dtype), *parts

    def problem(self, sources, outputs) -> str | None:
        """Looks whether every neuron is there once, with all its three parts; which went where is free."""
        gate, up, down, norm = sources
        router, *parts = outputs
        if any(part.dtype != self.dtype for part in outputs):
            return f"is not {self.dtype}"
        gates = torch.cat(parts[0::3])
        before = _neurons(gate.to(self.dtype), up.to(self.dtype), down.to(self.dtype))
        if before != _neurons(gates, torch.cat(parts[1::3]), torch.cat(parts[2::3], 1)):
            return "and its experts do not hold the neurons of the dense layer"
        expected = router_rows(gates[self.shared :], norm, self.experts, _SPREAD)
        return difference(router, expected.to(self.dtype))

    def _widths(self) -> list[int]:
        return [self.shared] * (self.shared > 0) + [self.width] * self.experts


@dataclass(frozen=True)
class WithZeroBias:
    """Casts a weight, and adds a bias of zeros for it."""

    dtype: torch.dtype

    def apply(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return *Cast(self.dtype).apply(weight), torch.zeros(len(weight), dtype=self.dtype)

    def problem(self, sources, outputs) -> str | None:
        return difference(outputs[0], sources[0].to(self.dtype)) or ("is not zero" if outputs[1].any() else None)


def plan_upcycle(source: SourceCheckpoint, options: UpcycleOptions, dtype: torch.dtype | None = None) -> Plan:
    """What making a DeepSeekMoE model of a dense one writes.

    Args:
        source: what `open_dense` gives.
        options: how the feed-forwards are cut.
        dtype: type of all weights; by default each keeps its own.

    Raises:
        CheckpointError: the model cannot be cut that way; names field or tensor, and what would work.
    """
    config_json = _config_json(source.config, options)
    try:
        config = DeepseekMoeConfig.from_dict(dict(config_json))
    except ValueError as error:
        raise CheckpointError(f"{source.folder}: {error}") from error
    shapes = {name: shape for name, (shape, _) in expected_tensors(config).items()}
    halves = [name for name in source.entries if (dtype or source.dtype(name)) == torch.float16]
    if halves:
        raise CheckpointError(
            f"{source.folder / source.file_of[halves[0]]}: tensor {halves[0]} would be float16, in which the new "
            "router is zero; give --dtype bfloat16 or float32"
        )

    def step_of(name: str) -> Step | None:
        return _step(source, name, options, config, shapes, dtype)

    shards = shards_like_source(source, step_of)
    config_json["dtype"] = str(dtype or source.dtype("model.embed_tokens.weight")).removeprefix("torch.")
    others = tuple(name for name in source.other_files if not name.endswith(".py"))
    return Plan(source, UPCYCLE, shards, config_json, others)


def _config_json(dense: DeepseekMoeConfig, options: UpcycleOptions) -> dict[str, Any]:
    """The new `config.json`."""
    parts = options.experts + options.shared_experts
    for name, value, least in [
        ("experts", options.experts, 1),
        ("shared_experts", options.shared_experts, 0),
        ("top_k", options.top_k, 1),
        ("dense_layers", options.dense_layers, 0),
    ]:
        if value < least:
            raise CheckpointError(f"{name}={value} must be at least {least}")
    if options.top_k > options.experts:
        raise CheckpointError(f"top_k={options.top_k} is more than experts={options.experts}")
    if options.dense_layers >= dense.num_hidden_layers:
        raise CheckpointError(
            f"dense_layers={options.dense_layers} leaves none of num_hidden_layers={dense.num_hidden_layers} to cut"
        )
    if dense.intermediate_size % parts:
        near = [str(count - options.shared_experts) for count in _divisors_around(dense.intermediate_size, options)]
        raise CheckpointError(
            f"intermediate_size={dense.intermediate_size} is not divisible by experts={options.experts} + "
            f"shared_experts={options.shared_experts}; experts={' or '.join(near)} would be possible"
        )
    return {
        "architectures": ["DeepseekMoeForCausalLM"],
        "model_type": "deepseek_moe",
        **{name: getattr(dense, name) for name in _KEPT_FIELDS},
        "n_routed_experts": options.experts,
        "n_shared_experts": options.shared_experts,
        "num_experts_per_tok": options.top_k,
        "moe_intermediate_size": dense.intermediate_size // parts,
        "first_k_dense_replace": options.dense_layers,
        "moe_layer_freq": 1,
        "scoring_func": "softmax",
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": False,
        "norm_topk_semantics": "deepseek_v2",
        "routed_scaling_factor": options.experts,
        "router_dtype": "float32",
        "aux_loss_alpha": 0.001,
        "seq_aux": True,
        "num_nextn_predict_layers": 0,
    }


def _divisors_around(width: int, options: UpcycleOptions) -> list[int]:
    """The next smaller and larger number of parts that `width` can be cut into."""
    parts = options.experts + options.shared_experts
    divisors = [count for count in range(options.shared_experts + 1, width + 1) if width % count == 0]
    smaller, larger = [n for n in divisors if n < parts], [n for n in divisors if n > parts]
    return smaller[-1:] + larger[:1]


def _step(source, name, options, config, shapes, dtype) -> Step | None:
    if is_redundant(name):
        return None
    layer, _, projection = name.partition(".mlp.")
    if projection and config.is_moe_layer(int(layer.rpartition(".")[2])):
        return _split(source, layer, options, config, shapes, dtype) if projection == "gate_proj.weight" else None
    wanted = dtype or source.dtype(name)
    spec = TensorSpec(name, wanted, source.entries[name].shape)
    bias = name.removesuffix("weight") + "bias"
    if bias.endswith(ZERO_BIAS) and bias in shapes and bias not in source.entries:
        return Step(WithZeroBias(wanted), (name,), (spec, TensorSpec(bias, wanted, shapes[bias])))
    return Step(Copy() if wanted == source.dtype(name) else Cast(wanted), (name,), (spec,))


def _split(source, layer, options, config, shapes, dtype) -> Step:
    sources = tuple(f"{layer}.mlp.{projection}.weight" for projection in _PROJECTIONS)
    wanted = dtype or source.dtype(sources[0])
    modules = ["mlp.shared_experts"] * (options.shared_experts > 0)
    modules += [f"mlp.experts.{expert}" for expert in range(options.experts)]
    names = [f"{layer}.mlp.gate.weight"]
    names += [f"{layer}.{module}.{projection}.weight" for module in modules for projection in _PROJECTIONS]
    width = config.moe_intermediate_size
    operation = SplitFeedForward(options.shared_experts * width, options.experts, width, wanted)
    specs = tuple(TensorSpec(name, wanted, shapes[name]) for name in names)
    return Step(operation, (*sources, f"{layer}.post_attention_layernorm.weight"), specs)


def _neurons(gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> list[bytes]:
    """A digest of every neuron's weights, in an order of their own."""
    rows = [part.contiguous().view(torch.uint8).numpy() for part in (gate, up, down.T)]
    return sorted(hashlib.blake2b(b"".join(map(bytes, parts))).digest() for parts in zip(*rows, strict=True))
