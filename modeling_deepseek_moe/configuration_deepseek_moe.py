"""One configuration for the whole DeepSeekMoE lineage; what differs between generations is data."""

import difflib
import json
from typing import Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

from .config_checks import ConfigChecks
from .families import (
    NamesNoCodeMixin,
    canonical_config_dict,
    family_config_dict,
    without_derived_head_dim,
    without_hub_kernels,
)
from .presets import PRESET_OF_SIBLING, PRESETS, released_json
from .rope_spelling import OLDER_FIELDS, check_fit, join_rope_spellings, with_overrides
from .transformers_names import CACHE_NAMES


@strict
class DeepseekMoeConfig(ConfigChecks, NamesNoCodeMixin, PreTrainedConfig):
    """Configuration of every model built on the DeepSeekMoE block.

    Field names are DeepSeek's. `from_pretrained` reads the `config.json` of any family (`families.FAMILIES`:
    `deepseek`, `deepseek_v2`, `deepseek_v3`, `kimi_k2`, `glm4_moe_lite`, ...) and fills in what that family's own
    class would; `preset` gives the released models by name. The defaults are a Moonlight-sized model with
    DeepSeek-V3's routing. `family` names the family that a sibling of DeepSeek's was read as and is saved as.

    Sizes: `vocab_size` tokens, `hidden_size` numbers for each of them in `num_hidden_layers` layers, at most
    `max_position_embeddings` positions. The MLP of a dense layer has `intermediate_size` neurons, a routed expert
    `moe_intermediate_size`; `hidden_act` is their activation. `tie_word_embeddings=True` makes the embedding the head.
    New weights are drawn with the standard deviation `initializer_range`.

    Attention: `num_attention_heads` heads of queries, on `num_key_value_heads` of keys and values (by default as
    many). `kv_lora_rank=None` means plain multi-head or grouped-query attention (DeepSeekMoE 16B) with heads of
    `head_dim` (by default `hidden_size / num_attention_heads`), which `use_qk_norm` normalises before their rotation
    (Qwen3). Else Multi-head Latent Attention: `qk_nope_head_dim` numbers of a head's queries and keys stay as they
    are, `qk_rope_head_dim` are rotated, and its values have `v_head_dim`; `q_lora_rank=None` leaves queries
    uncompressed. `attention_bias` puts a bias on the projections, `attention_output_bias=False` spares the last of
    them. `attention_dropout` drops weights of attention in training. `index_topk`, `index_n_heads` and
    `index_head_dim` give latent attention DeepSeek-V3.2's indexer, which lets a query see that many tokens.

    Layers: the first `first_k_dense_replace` and all whose number `moe_layer_freq` does not divide are dense, unless
    `mlp_layer_types` says it layer by layer ("dense", "sparse"); MTP modules follow the rule, or are sparse.

    Routing: a layer has `n_routed_experts` (None: every layer is dense), of which `num_experts_per_tok` serve a token,
    and `n_shared_experts` that serve all, as one MLP of their joint width; `output_router_logits` returns the logits
    of every such layer. `scoring_func` ("softmax", "sigmoid") gives the scores, `topk_method` chooses experts:
    "greedy", "group_limited_greedy" (V2: `topk_group` of `n_group` groups by their best expert), "group_limited_top2"
    (by the sum of their two best) or "noaux_tc" (V3: that with biased scores). `norm_topk_semantics` says what
    `norm_topk_prob` does: "deepseek_v2" divides the chosen weights by their sum *instead of* scaling, and leaves a
    single expert alone;
    "deepseek_v3" divides, then multiplies by `routed_scaling_factor` (FACTS 8.3). `router_dtype="model"` computes
    router logits in the model's dtype, as DeepSeekMoE 16B was trained; the default is float32.

    Balance group (training only; formulas in `balancing`): every coefficient weighs one loss of each MoE layer, their
    sum is added to `loss`, and 0 costs nothing. `aux_loss_alpha` weighs the loss that `aux_loss_type` names: "expert"
    (V1, V2), "sequence" (V3), or "auto", which is "sequence" for `topk_method="noaux_tc"` and else "expert".
    `device_loss_alpha` (V1, V2) and `communication_loss_alpha` (V2) balance `balance_devices` groups of experts, by
    default the `n_group` groups. `seq_aux` counts all but V3's loss per sequence rather than per batch.
    `aux_loss_counts_padding=True` counts padding as DeepSeek's own code does.

    Multi-token prediction: `num_nextn_predict_layers` MTP modules follow the main layers; `mtp_loss_weight` (the
    paper's lambda) trains them, 0 keeps them frozen.

    Loss: training logits of more than `loss_chunk_bytes` in float32 are made in chunks; 0 makes them all at once.

    Norms and rotary: `latent_norm_eps` is the epsilon of the two latent norms, 1e-6 in DeepSeek's own code whatever
    `rms_norm_eps` says; `rope_interleave` tells how rotary pairs lie in the projection rows; `rope_parameters` are
    transformers', of any type, and a key that the type does not read is an error.

    Generation: `use_cache` keeps keys and values, or latents, of the tokens before; `pad_token_id`, `bos_token_id` and
    `eos_token_id` are the tokenizer's.

    Raises:
        ValueError: a value no model can have; the message names field, value and choices.
    """

    model_type = "deepseek_moe"
    keys_to_ignore_at_inference = list(CACHE_NAMES)
    attribute_map = {
        "num_local_experts": "n_routed_experts",
        "num_experts": "n_routed_experts",
        "num_mtp_layers": "num_nextn_predict_layers",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }
    base_model_ep_plan = {
        "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
        "layers.*.mlp.experts.down_proj": "grouped_gemm",
        "layers.*.mlp.experts": "ep_dispatch_experts",
    }

    vocab_size: int = 163840
    hidden_size: int = 2048
    intermediate_size: int = 11264
    moe_intermediate_size: int = 1408
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    family: str | None = None
    head_dim: int | None = None
    use_qk_norm: bool = False
    n_routed_experts: int | None = 64
    n_shared_experts: int | None = 2
    num_experts_per_tok: int | None = 6
    first_k_dense_replace: int = 1
    moe_layer_freq: int = 1
    mlp_layer_types: list[str] | None = None
    n_group: int | None = 1
    topk_group: int | None = 1
    topk_method: str = "noaux_tc"
    scoring_func: str = "sigmoid"
    norm_topk_prob: bool = True
    norm_topk_semantics: str = "deepseek_v3"
    routed_scaling_factor: float | int = 1.0
    router_dtype: str = "float32"
    aux_loss_alpha: float | int = 0.0001
    aux_loss_type: str = "auto"
    seq_aux: bool = True
    device_loss_alpha: float | int = 0.0
    communication_loss_alpha: float | int = 0.0
    balance_devices: int | None = None
    aux_loss_counts_padding: bool = False
    output_router_logits: bool = False
    kv_lora_rank: int | None = 512
    q_lora_rank: int | None = None
    qk_nope_head_dim: int | None = 128
    qk_rope_head_dim: int | None = 64
    v_head_dim: int | None = 128
    latent_norm_eps: float = 1e-6
    index_topk: int | None = None
    index_n_heads: int | None = None
    index_head_dim: int | None = None
    rope_interleave: bool = True
    rope_parameters: RopeParameters | dict | None = None
    num_nextn_predict_layers: int = 0
    mtp_loss_weight: float | int = 0.0
    loss_chunk_bytes: int = 128 * 2**20
    hidden_act: str = "silu"
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    attention_output_bias: bool | None = None
    attention_dropout: float | int = 0.0
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        older_rope = {name: kwargs.pop(name) for name in OLDER_FIELDS if name in kwargs}
        self.rope_parameters = join_rope_spellings(self.rope_parameters, older_rope)
        self.n_group = 1 if self.n_group is None else self.n_group
        self.topk_group = 1 if self.topk_group is None else self.topk_group
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        self.check_values()
        # transformers reads `head_dim` as the rotary width, and `qk_head_dim` as the mark of an MLA model.
        if self.kv_lora_rank is None:
            self.qk_head_dim = None
            self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        else:
            self.qk_head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
            self.head_dim = self.qk_rope_head_dim
        check_fit(self)
        kwargs.pop("qk_head_dim", None)
        self.base_model_tp_plan = self.tensor_parallel_plan()
        super().__post_init__(**kwargs)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "DeepseekMoeConfig":
        """The configuration of a released model.

        Args:
            name: e.g. "deepseek-v2-lite", or a sibling's name such as "deepseek-r1"; upper case and an organisation
                prefix (`deepseek-ai/DeepSeek-V2-Lite`) are accepted.
            **overrides: fields to set differently, e.g. `num_hidden_layers=2`.

        Raises:
            ValueError: no such preset; names the nearest and all choices.
        """
        key = name.rsplit("/", 1)[-1].lower()
        fields = released_json(key)
        if fields is None:
            known = [*PRESETS, *PRESET_OF_SIBLING]
            nearest = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ";"
            raise ValueError(f"no preset is named {name!r}{hint} choices: {', '.join(known)}")
        config, unknown = cls.from_dict(fields, return_unused_kwargs=True, **overrides)
        if unknown:
            raise ValueError(f"DeepseekMoeConfig has no field {', '.join(sorted(unknown))}")
        return config

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        config_dict = without_hub_kernels(config_dict)
        # Overrides are read like the json itself: checked, and what is derived from them follows.
        names = {"rope_scaling", "rope_theta", *DeepseekMoeConfig.__annotations__} & kwargs.keys()
        overrides = {name: kwargs.pop(name) for name in names}
        if not overrides.keys().isdisjoint(("hidden_size", "num_attention_heads")):
            config_dict = without_derived_head_dim(config_dict)
        try:
            return super().from_dict(with_overrides(canonical_config_dict(config_dict), overrides), **kwargs)
        except StrictDataclassError as error:
            raise ValueError(" ".join(str(error).split())) from error

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return canonical_config_dict(config_dict), kwargs

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except ValueError as error:
            raise ValueError(f"{error} (config.json of {pretrained_model_name_or_path})") from error

    def to_json_string(self, use_diff: bool = True) -> str:
        """The text of `config.json`: that of the family's own class where it is the same model, else ours."""
        of_family = family_config_dict(self) if use_diff else None
        if of_family is None:
            return super().to_json_string(use_diff)
        return json.dumps(of_family, indent=2, sort_keys=True) + "\n"

    def is_moe_layer(self, layer_idx: int) -> bool:
        """Whether layer `layer_idx` routes to experts; the rule counts on into the MTP layers behind the main ones."""
        if self.n_routed_experts is None:
            return False
        if self.mlp_layer_types is not None:
            is_mtp = layer_idx >= self.num_hidden_layers
            return is_mtp or self.mlp_layer_types[layer_idx] == "sparse"
        return layer_idx >= self.first_k_dense_replace and layer_idx % self.moe_layer_freq == 0

    @property
    def has_experts(self) -> bool:
        """Whether any layer that a forward pass runs routes to experts."""
        return any(self.is_moe_layer(layer) for layer in range(self.num_hidden_layers))

    @property
    def has_output_bias(self) -> bool:
        """Whether attention's last projection has a bias."""
        return self.attention_bias if self.attention_output_bias is None else self.attention_output_bias

    @property
    def rotary_dim(self) -> int:
        """How many numbers of a head are rotated; of plain attention's the first, by `partial_rotary_factor`."""
        if self.kv_lora_rank is not None:
            return self.qk_rope_head_dim
        return int(self.head_dim * self.rope_parameters.get("partial_rotary_factor", 1.0))

    @property
    def uses_sequence_loss(self) -> bool:
        """Whether `aux_loss_alpha` weighs V3's sequence-wise loss and not the expert-level loss."""
        return self.aux_loss_type == "sequence" or (self.aux_loss_type == "auto" and self.topk_method == "noaux_tc")

    def tensor_parallel_plan(self) -> dict[str, str]:
        """Tensor-parallel style of each module this configuration has (rules that match nothing are warned about)."""
        plan = {f"layers.*.self_attn.{name}": "colwise" for name in self._column_parallel_attention()}
        if self.kv_lora_rank is not None:
            plan["layers.*.self_attn.kv_a_proj_with_mqa"] = "mla_kv_a_proj"
        if self.use_qk_norm:
            plan |= {f"layers.*.self_attn.{name}": "replicated_with_grad_allreduce" for name in ("q_norm", "k_norm")}
        plan["layers.*.self_attn.o_proj"] = "rowwise"
        layers = [self.is_moe_layer(i) for i in range(self.num_hidden_layers + self.num_nextn_predict_layers)]
        mlps = []
        if any(layers):
            plan["layers.*.mlp.experts.gate_up_proj"] = "packed_colwise"
            plan["layers.*.mlp.experts.down_proj"] = "rowwise"
            plan["layers.*.mlp.experts"] = "moe_tp_experts"
            mlps += ["layers.*.mlp.shared_experts"] if self.n_shared_experts else []
        mlps += [] if all(layers) else ["layers.*.mlp"]
        for mlp in mlps:
            plan |= {f"{mlp}.gate_proj": "colwise", f"{mlp}.up_proj": "colwise", f"{mlp}.down_proj": "rowwise"}
        return plan

    def _column_parallel_attention(self) -> list[str]:
        if self.kv_lora_rank is None:
            return ["q_proj", "k_proj", "v_proj"]
        return ["q_proj" if self.q_lora_rank is None else "q_b_proj", "kv_b_proj"]


__all__ = ["DeepseekMoeConfig"]
