"""`config.json` files that other software reads as DeepSeek's own, and what each of those models cannot express.

transformers, vLLM, SGLang and llama.cpp ignore fields they do not know, so a model that needs such a field would run
there, and compute something else. Source of what each one honours: FACTS 8.3.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from modeling_deepseek_moe import CheckpointError, DeepseekMoeConfig
from modeling_deepseek_moe.rope_spelling import READ_ELSEWHERE, older_rope_spelling

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "first_k_dense_replace",
    "moe_layer_freq",
    "max_position_embeddings",
)
_OTHERS = (
    "scoring_func",
    "norm_topk_prob",
    "aux_loss_alpha",
    "seq_aux",
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
_LATENT = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_GROUPS = ("n_group", "topk_group", "topk_method", "routed_scaling_factor")

Problem = tuple[str, str]  # a field, and what the model does with it


@dataclass(frozen=True)
class NativeModel:
    """One of DeepSeek's own model types.

    Attributes:
        model_type: what `config.json` calls it.
        architecture: the class named there.
        fields: what is written.
        fixed: fields with the only values that the model can have.
        problem: finds what `fixed` cannot say; a field and a reason, or None.
    """

    model_type: str
    architecture: str
    fields: tuple[str, ...]
    fixed: dict[str, tuple[Any, ...]]
    problem: Callable[[DeepseekMoeConfig], Problem | None]
    rope_types: tuple[str, ...] = field(default=("default", "linear", "dynamic", "yarn"))

    def check(self, config: DeepseekMoeConfig) -> None:
        """Nothing, if the model is the one that `config` describes.

        Raises:
            CheckpointError: the model cannot express a field of `config`; names it and its value.
        """
        for name, values in self.fixed.items():
            value = getattr(config, name)
            if value not in values:
                raise self._cannot(name, value, f"it is always {' or '.join(map(repr, values))} there")
        rope_type = config.rope_parameters["rope_type"]
        if rope_type not in self.rope_types:
            raise self._cannot("rope_type", rope_type, f"only {', '.join(self.rope_types)} are known there")
        found = _common_problem(config) or self.problem(config)
        if found:
            raise self._cannot(found[0], getattr(config, found[0]), found[1])

    def config_json(self, config: DeepseekMoeConfig) -> dict[str, Any]:
        """The model's `config.json`; errors are those of `check`."""
        self.check(config)
        values = {name: getattr(config, name) for name in self.fields}
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            **values,
            **older_rope_spelling(config.rope_parameters),
        }

    def _cannot(self, name: str, value: Any, reason: str) -> CheckpointError:
        return CheckpointError(f"{name}={value!r} cannot be expressed as {self.model_type}: {reason}")


def _common_problem(config: DeepseekMoeConfig) -> Problem | None:
    if config.n_routed_experts is None:
        return "n_routed_experts", "a model without experts is not one of this type"
    rope = config.rope_parameters
    if rope["rope_type"] == "yarn":
        both = rope.get("mscale") and rope.get("mscale_all_dim")
        neither = not rope.get("mscale_all_dim") and rope.get("mscale") in (None, 1)
        if not (both or neither):  # FACTS T6
            return "rope_parameters", "implementations disagree on mscale without mscale_all_dim, or the reverse"
        if other := next((name for name in READ_ELSEWHERE if rope.get(name, 1) != 1), None):
            return "rope_parameters", f"implementations disagree on {other}"
    return None


def rope_notes(config: DeepseekMoeConfig) -> tuple[str, ...]:
    """What transformers reads of the rotary settings, and DeepSeek's own code does not."""
    rope = config.rope_parameters
    found = {
        "attention_factor": rope.get("attention_factor"),
        "truncate": False if not rope.get("truncate", True) else None,
    }
    return tuple(
        f"rope_scaling has {name}={value}: transformers' classes read it, DeepSeek's own code does not; see that what "
        "serves the model does"
        for name, value in found.items()
        if value is not None and rope["rope_type"] == "yarn"
    )


def _v1_problem(config: DeepseekMoeConfig) -> Problem | None:
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        return "head_dim", "it is hidden_size / num_attention_heads there"
    normalises = config.norm_topk_prob and (config.num_experts_per_tok > 1)
    scales = not normalises or config.norm_topk_semantics == "deepseek_v3"
    if scales and config.routed_scaling_factor != 1:
        return "routed_scaling_factor", "weights are not scaled there"
    if config.norm_topk_prob and not normalises and config.norm_topk_semantics == "deepseek_v3":
        return "norm_topk_prob", "the weight of a single expert is not normalised there"
    return None


def _v2_problem(config: DeepseekMoeConfig) -> Problem | None:
    if not config.n_shared_experts:
        return "n_shared_experts", "there is at least one there"
    return None


def _v3_problem(config: DeepseekMoeConfig) -> Problem | None:
    if not config.n_shared_experts:
        return "n_shared_experts", "there is at least one there"
    if config.n_routed_experts // config.n_group < 2:  # FACTS T4
        return "n_group", f"groups of n_routed_experts={config.n_routed_experts} have at least two experts there"
    is_v2 = config.norm_topk_prob and config.norm_topk_semantics != "deepseek_v3"
    if is_v2 and (config.routed_scaling_factor != 1 or config.num_experts_per_tok == 1):
        return "norm_topk_semantics", "normalised weights are scaled there, those of a single expert too"
    return None


_LATENT_FIXED = {
    "use_qk_norm": (False,),
    "moe_layer_freq": (1,),
    "rope_interleave": (True,),
    "latent_norm_eps": (1e-6,),
    "router_dtype": ("float32",),
}

NATIVE_MODELS = {
    "deepseek": NativeModel(
        model_type="deepseek",
        architecture="DeepseekForCausalLM",
        fields=_SIZES + _OTHERS,
        fixed={
            "kv_lora_rank": (None,),
            "scoring_func": ("softmax",),
            "topk_method": ("greedy",),
            "rope_interleave": (False,),
            "num_nextn_predict_layers": (0,),
            "use_qk_norm": (False,),
        },
        problem=_v1_problem,
        rope_types=("default", "linear", "dynamic"),
    ),
    "deepseek_v2": NativeModel(
        model_type="deepseek_v2",
        architecture="DeepseekV2ForCausalLM",
        fields=_SIZES + _LATENT + _GROUPS + _OTHERS,
        fixed={
            "scoring_func": ("softmax",),
            "topk_method": ("greedy", "group_limited_greedy"),
            "norm_topk_prob": (False,),  # transformers' class ignores it (FACTS T1)
            "num_nextn_predict_layers": (0,),
            **_LATENT_FIXED,
        },
        problem=_v2_problem,
    ),
    "deepseek_v3": NativeModel(
        model_type="deepseek_v3",
        architecture="DeepseekV3ForCausalLM",
        fields=_SIZES + _LATENT + _GROUPS + _OTHERS + ("num_nextn_predict_layers",),
        fixed={"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",), **_LATENT_FIXED},
        problem=_v3_problem,
    ),
}
