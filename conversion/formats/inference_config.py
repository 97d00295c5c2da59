"""ModelArgs, the JSON of DeepSeek's inference program (`inference/model.py`), and what it means as a `config.json`.

Source: FACTS 8.3 (what the program computes) and 9. Most of it is fixed in the program's code: normalised weights
with sigmoid scores and only there, epsilons of 1e-6, interleaved rotary pairs, no biases, YaRN only for a
`max_seq_len` beyond `original_seq_len`.
"""

from pathlib import Path
from typing import Any

from modeling_deepseek_moe import CheckpointError, DeepseekMoeConfig
from modeling_deepseek_moe.families import FAMILIES

from ..engine.beside import MAX_LAYERS
from .native import NATIVE_MODELS, NativeModel, Problem

INFERENCE = "deepseek-inference"
# The program has a routing bias in models of this width, and in no others (FACTS 9).
BIASED_WIDTH = 7168

# ModelArgs fields of the same meaning under another name, or the same.
_FIELDS = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "inter_dim": "intermediate_size",
    "moe_inter_dim": "moe_intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_dense_layers": "first_k_dense_replace",
    "n_heads": "num_attention_heads",
    "n_routed_experts": "n_routed_experts",
    "n_shared_experts": "n_shared_experts",
    "n_activated_experts": "num_experts_per_tok",
    "score_func": "scoring_func",
    "route_scale": "routed_scaling_factor",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
}
# What a JSON that leaves a field out means.
_DEFAULTS = {
    "max_batch_size": 8,
    "max_seq_len": 16384,
    "dtype": "bf16",
    "scale_fmt": None,
    "vocab_size": 102400,
    "dim": 2048,
    "inter_dim": 10944,
    "moe_inter_dim": 1408,
    "n_layers": 27,
    "n_dense_layers": 1,
    "n_heads": 16,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "n_activated_experts": 6,
    "n_expert_groups": 1,
    "n_limited_groups": 1,
    "score_func": "softmax",
    "route_scale": 1.0,
    "q_lora_rank": 0,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "original_seq_len": 4096,
    "rope_theta": 10000.0,
    "rope_factor": 40.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
}
_CHOICES = {"dtype": ("bf16", "fp8"), "scale_fmt": (None, "ue8m0"), "score_func": ("softmax", "sigmoid")}
_FRACTIONS = ("route_scale", "rope_theta", "rope_factor", "beta_fast", "beta_slow", "mscale")
_YARN_FIELDS = ("original_seq_len", "rope_factor", "beta_fast", "beta_slow", "mscale")
# They say how the program is run, not what the model is.
_RUNTIME_FIELDS = ("max_batch_size", "max_seq_len", "dtype", "scale_fmt")
_YARN_KEYS = {
    "rope_type",
    "rope_theta",
    "factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "original_max_position_embeddings",
}
_LARGEST = 2**31


def _program_problem(config: DeepseekMoeConfig) -> Problem | None:
    if not config.n_shared_experts:
        return "n_shared_experts", "there is at least one there"
    divides = config.norm_topk_prob and (config.norm_topk_semantics == "deepseek_v3" or config.num_experts_per_tok > 1)
    if divides != (config.scoring_func == "sigmoid"):
        return "norm_topk_prob", "sigmoid weights are always normalised there, softmax weights never"
    if divides and config.norm_topk_semantics != "deepseek_v3" and config.routed_scaling_factor != 1:
        return "norm_topk_semantics", "normalised weights are scaled there"
    if config.hidden_size == BIASED_WIDTH and config.topk_method != "noaux_tc":
        return "topk_method", f"models of hidden_size={BIASED_WIDTH} have a routing bias there"
    if config.topk_method == "noaux_tc" and config.n_group > 1 and config.n_routed_experts // config.n_group < 2:
        return "n_group", f"groups of n_routed_experts={config.n_routed_experts} have at least two experts there"
    rope = config.rope_parameters
    if rope["rope_type"] == "yarn":
        same = {"truncate": True, "attention_factor": 1}  # what the program does
        unknown = sorted(name for name in rope.keys() - _YARN_KEYS if rope[name] != same.get(name))
        if unknown:
            return "rope_parameters", f"{unknown[0]} does not exist there"
        if not rope.get("mscale") or rope["mscale"] != rope.get("mscale_all_dim"):
            return "rope_parameters", "mscale and mscale_all_dim are one number there"
        if not rope.get("original_max_position_embeddings"):
            return "rope_parameters", "original_max_position_embeddings is a number there"
    return None


_PROGRAM = NativeModel(
    model_type=INFERENCE,
    architecture="Transformer",
    fields=(),
    fixed={
        "attention_bias": (False,),
        "tie_word_embeddings": (False,),
        "hidden_act": ("silu",),
        "moe_layer_freq": (1,),
        "rope_interleave": (True,),
        "rms_norm_eps": (1e-6,),
        "latent_norm_eps": (1e-6,),
    },
    problem=_program_problem,
    rope_types=("default", "yarn"),
)


def model_args(config: DeepseekMoeConfig, dtype: str, scale_fmt: str | None = None) -> dict[str, Any]:
    """The ModelArgs of a model.

    Args:
        config: the model's configuration.
        dtype: "bf16" or "fp8", of the linear layers.
        scale_fmt: "ue8m0" if the activations' scales are powers of two.

    Raises:
        CheckpointError: the program cannot run that model; names the field of `config` and its value.
    """
    if config.kv_lora_rank is None:
        raise CheckpointError(f"kv_lora_rank=None cannot be expressed as {INFERENCE}: attention is always MLA there")
    _PROGRAM.check(config)
    grouped = config.topk_method != "greedy"
    return {
        "max_batch_size": _DEFAULTS["max_batch_size"],
        "dtype": dtype,
        **({"scale_fmt": scale_fmt} if scale_fmt else {}),  # programs before DeepSeek-V3.1 do not know the field
        **{name: getattr(config, field) for name, field in _FIELDS.items()},
        "n_expert_groups": config.n_group if grouped else 1,
        "n_limited_groups": config.topk_group if grouped else 1,
        "q_lora_rank": config.q_lora_rank or 0,
        **_rope_args(config),
    }


def _rope_args(config: DeepseekMoeConfig) -> dict[str, Any]:
    """The program reserves its cache for `max_seq_len` positions, so that is at most its own default if possible."""
    rope, default = config.rope_parameters, _DEFAULTS["max_seq_len"]
    window = config.max_position_embeddings
    if rope["rope_type"] == "default":
        args = {"original_seq_len": window, "rope_factor": 1.0, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0}
        return {"max_seq_len": min(window, default), "rope_theta": rope["rope_theta"], **args}
    original = rope["original_max_position_embeddings"]
    window = max(window, round(original * rope["factor"]))
    return {
        "max_seq_len": default if original < default < window else window,
        "original_seq_len": original,
        "rope_theta": rope["rope_theta"],
        "rope_factor": rope["factor"],
        "beta_fast": rope.get("beta_fast") or 32,
        "beta_slow": rope.get("beta_slow") or 1,
        "mscale": rope["mscale"],
    }


def read_model_args(args: dict[str, Any], path: Path) -> dict[str, Any]:
    """The ModelArgs of the JSON `args` of file `path`: every field, at its default where the JSON leaves it out.

    Raises:
        CheckpointError: a field that ModelArgs does not have, or a value that it cannot take.
    """
    if "model_type" in args or "hidden_size" in args:
        raise CheckpointError(
            f"{path} is the config of a transformers model, not ModelArgs; the file that DeepSeek's generate.py takes "
            "as --config belongs beside it as model_args.json"
        )
    for name, value in args.items():
        if name not in _DEFAULTS:
            raise CheckpointError(f"{path}: {name!a} is not a field of ModelArgs")
        if name in _CHOICES:
            if value not in _CHOICES[name]:
                choices = ", ".join(map(repr, _CHOICES[name]))
                raise CheckpointError(f"{path}: {name}={value!a} is not one of {choices}")
        elif name in _FRACTIONS:
            if type(value) not in (int, float) or not 0 < value < _LARGEST:
                raise CheckpointError(f"{path}: {name}={value!a} is not a positive number")
        elif type(value) is not int or not 0 <= value < _LARGEST:
            raise CheckpointError(f"{path}: {name}={value!a} is not a whole number that a model can have")
    if args.get("n_layers", 0) > MAX_LAYERS:
        raise CheckpointError(f"{path}: n_layers={args['n_layers']} is more than the {MAX_LAYERS} layers read here")
    return _DEFAULTS | args


def config_json_of(
    args: dict[str, Any], *, has_bias: bool, mtp_layers: int, dtype: str, ids: dict[str, Any]
) -> dict[str, Any]:
    """A `config.json` for a model of which only ModelArgs are known.

    Args:
        args: ModelArgs as `read_model_args` gives them.
        has_bias: whether there are routing biases.
        mtp_layers: how many MTP modules lie beside it.
        dtype: torch's name for that of the plain weights.
        ids: special token ids; those it lacks are DeepSeek-V2's or V3's.
    """
    is_sigmoid = args["score_func"] == "sigmoid"
    model_type = "deepseek_v3" if is_sigmoid else "deepseek_v2"
    defaults = FAMILIES[model_type].defaults
    is_native = is_sigmoid == has_bias
    ungrouped = "noaux_tc" if has_bias else "greedy"
    grouped = "noaux_tc" if has_bias else "group_limited_greedy"
    window = args["original_seq_len"]
    if uses_yarn(args):
        window = max(args["max_seq_len"], round(window * args["rope_factor"]))
    return {
        "architectures": [NATIVE_MODELS[model_type].architecture if is_native else "DeepseekMoeForCausalLM"],
        "model_type": model_type if is_native else "deepseek_moe",
        **{field: args[name] for name, field in _FIELDS.items()},
        "num_key_value_heads": args["n_heads"],
        "q_lora_rank": args["q_lora_rank"] or None,
        "n_group": args["n_expert_groups"],
        "topk_group": args["n_limited_groups"],
        "topk_method": grouped if args["n_expert_groups"] > 1 else ungrouped,
        "norm_topk_prob": is_sigmoid,
        **({} if is_native else {"norm_topk_semantics": defaults["norm_topk_semantics"]}),
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": mtp_layers,
        "max_position_embeddings": window,
        "rope_theta": args["rope_theta"],
        "rope_scaling": _yarn(args) if uses_yarn(args) else None,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        **{name: ids.get(name, defaults[name]) for name in ("bos_token_id", "eos_token_id")},
        "torch_dtype": dtype,
    }


def uses_yarn(args: dict[str, Any]) -> bool:
    """Whether the program extends the context of a model with these ModelArgs (FACTS T7)."""
    return args["max_seq_len"] > args["original_seq_len"]


def _yarn(args: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "yarn",
        "factor": args["rope_factor"],
        "beta_fast": args["beta_fast"],
        "beta_slow": args["beta_slow"],
        "mscale": args["mscale"],
        "mscale_all_dim": args["mscale"],
        "original_max_position_embeddings": args["original_seq_len"],
    }


def check_agreement(args: dict[str, Any], config: DeepseekMoeConfig, path: Path, other: str) -> None:
    """Raises `CheckpointError` if the ModelArgs in file `path` are not those of `config`, read from file `other`."""
    own = model_args(config, args["dtype"])
    yarn = config.rope_parameters["rope_type"] == "yarn"
    if not yarn and uses_yarn(args):
        raise CheckpointError(
            f"{path}: max_seq_len={args['max_seq_len']} beyond original_seq_len={args['original_seq_len']} means "
            f"YaRN, but {other} has none; remove the one that is wrong"
        )
    ignored = {*_RUNTIME_FIELDS, *(() if yarn else _YARN_FIELDS)}
    for name in own.keys() - ignored:
        if args[name] != own[name]:
            raise CheckpointError(
                f"{path}: {name}={args[name]} contradicts {other}, which means {own[name]}; correct one of them"
            )
