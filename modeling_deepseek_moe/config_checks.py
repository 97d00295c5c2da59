"""What no model of the family can be: checked before any weight is read, in messages that name the field."""

import math

from transformers.activations import ACT2FN

from .families import FAMILIES

_CHOICES = {
    "scoring_func": ("softmax", "sigmoid"),
    "topk_method": ("greedy", "group_limited_greedy", "group_limited_top2", "noaux_tc"),
    "norm_topk_semantics": ("deepseek_v2", "deepseek_v3"),
    "router_dtype": ("float32", "model"),
    "aux_loss_type": ("auto", "expert", "sequence"),
}
_AT_LEAST_ONE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
_NOT_NEGATIVE = (
    "first_k_dense_replace",
    "n_shared_experts",
    "num_nextn_predict_layers",
    "aux_loss_alpha",
    "device_loss_alpha",
    "communication_loss_alpha",
    "mtp_loss_weight",
    "loss_chunk_bytes",
    "routed_scaling_factor",
    "initializer_range",
    "rms_norm_eps",
    "latent_norm_eps",
)
# Far more than any model has; the code that counts them one by one would not come to an end.
_AT_MOST = {"num_hidden_layers": 1024, "num_nextn_predict_layers": 1024, "n_routed_experts": 16_384}
_MOE_AT_LEAST_ONE = ("n_routed_experts", "moe_intermediate_size", "moe_layer_freq")
_INDEXER = ("index_topk", "index_n_heads", "index_head_dim")
_MLA_POSITIVE = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


class ConfigChecks:
    """The checks of a `DeepseekMoeConfig`."""

    def check_values(self) -> None:
        """Raises `ValueError` for a combination of values no model can have; runs before any weight is read."""
        if self.family is not None and self.family not in FAMILIES:
            raise ValueError(f"family={self.family!r} is not one of {', '.join(map(repr, FAMILIES))}")
        for field, choices in _CHOICES.items():
            value = getattr(self, field)
            if value not in choices:
                raise ValueError(f"{field}={value!r} is not one of {', '.join(map(repr, choices))}")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act={self.hidden_act!r} is not one of {', '.join(map(repr, ACT2FN))}")
        self._check_at_least_one(_AT_LEAST_ONE)
        for field, most in _AT_MOST.items():
            if (getattr(self, field) or 0) > most:
                raise ValueError(f"{field}={getattr(self, field)} is more than the {most} read here")
        for field in _NOT_NEGATIVE:
            value = getattr(self, field)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{field}={value} must be a number of at least 0")
        if self.pad_token_id is not None and not -self.vocab_size <= self.pad_token_id < self.vocab_size:
            raise ValueError(f"pad_token_id={self.pad_token_id} is not a token of vocab_size={self.vocab_size}")
        if not 0 <= self.attention_dropout <= 1:
            raise ValueError(f"attention_dropout={self.attention_dropout} must lie between 0 and 1")
        self._check_attention()
        self._check_rotary_share()
        self._check_indexer()
        self._check_layer_types()
        if self.n_routed_experts is not None:
            self._check_routing()

    def _check_at_least_one(self, fields: tuple[str, ...]) -> None:
        for field in fields:
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be at least 1")

    def _check_attention(self) -> None:
        if self.kv_lora_rank is None:
            heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
            if self.head_dim is None and self.hidden_size % heads:
                raise ValueError(f"hidden_size={self.hidden_size} is not divisible by num_attention_heads={heads}")
            if self.head_dim is None and (self.hidden_size // heads) % 2:
                raise ValueError(f"the head width hidden_size/num_attention_heads={self.hidden_size // heads} is odd")
            if self.head_dim is not None and (self.head_dim < 2 or self.head_dim % 2):
                raise ValueError(f"head_dim={self.head_dim} is not even and at least 2; rotary embeddings turn pairs")
            if kv_heads < 1 or heads % kv_heads:
                raise ValueError(f"num_key_value_heads={kv_heads} does not divide num_attention_heads={heads}")
            return
        if self.use_qk_norm:
            raise ValueError("use_qk_norm=True is for plain attention (kv_lora_rank=None); MLA has norms of its own")
        for field in _MLA_POSITIVE:
            value = getattr(self, field)
            if value is None or value < 1:
                raise ValueError(f"{field}={value} must be at least 1 (kv_lora_rank=None selects plain attention)")
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim={self.qk_rope_head_dim} is odd; rotary embeddings turn pairs")
        if self.q_lora_rank is not None and self.q_lora_rank < 1:
            raise ValueError(f"q_lora_rank={self.q_lora_rank} must be at least 1, or null for uncompressed queries")

    def _check_rotary_share(self) -> None:
        share, rope_type = self.rope_parameters.get("partial_rotary_factor", 1), self.rope_parameters["rope_type"]
        # "proportional" leaves pairs of the rotary width unturned, whatever the attention.
        if self.kv_lora_rank is None or share == 1 or rope_type == "proportional":
            return
        own = self.qk_rope_head_dim / (self.qk_nope_head_dim + self.qk_rope_head_dim)
        # Frequencies of the other types are transformers', which takes the share of the rotary width once more.
        if rope_type not in ("default", "yarn") or abs(share - own) > 1e-6:
            raise ValueError(
                f"partial_rotary_factor={share} of the rope settings is not the share that latent attention rotates: "
                f"qk_rope_head_dim={self.qk_rope_head_dim} of {self.qk_nope_head_dim + self.qk_rope_head_dim}"
            )

    def _check_indexer(self) -> None:
        sizes = {name: getattr(self, name) for name in _INDEXER}
        if all(value is None for value in sizes.values()):
            return
        for field, value in sizes.items():
            if value is None or value < 1:
                raise ValueError(f"{field}={value} must be at least 1 where other sizes of the indexer are set")
        if self.kv_lora_rank is None or self.q_lora_rank is None:
            raise ValueError(
                f"index_topk={self.index_topk} needs latent attention and compressed queries (q_lora_rank)"
            )
        if self.index_head_dim < self.qk_rope_head_dim:
            raise ValueError(
                f"index_head_dim={self.index_head_dim} is narrower than qk_rope_head_dim={self.qk_rope_head_dim}"
            )

    def _check_layer_types(self) -> None:
        types, layers = self.mlp_layer_types, self.num_hidden_layers
        if types is None:
            return
        if other := sorted({str(kind) for kind in types} - {"dense", "sparse"}):
            raise ValueError(f"mlp_layer_types holds {other[0]!r}; choices: 'dense', 'sparse'")
        if len(types) < layers:
            raise ValueError(f"mlp_layer_types names {len(types)} layers of num_hidden_layers={layers}")

    def _check_routing(self) -> None:
        experts, top_k = self.n_routed_experts, self.num_experts_per_tok
        self._check_at_least_one(_MOE_AT_LEAST_ONE)
        if top_k is None or not 1 <= top_k <= experts:
            raise ValueError(f"num_experts_per_tok={top_k} must lie between 1 and n_routed_experts={experts}")
        self._check_balancing()
        if self.topk_method == "greedy":
            return
        if self.n_group < 1 or experts % self.n_group:
            raise ValueError(f"n_routed_experts={experts} is not divisible into n_group={self.n_group} groups")
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group={self.topk_group} is larger than n_group={self.n_group}")
        if self.topk_group < 1 or self.topk_group * (experts // self.n_group) < top_k:
            raise ValueError(
                f"topk_group={self.topk_group} of n_group={self.n_group} groups leaves "
                f"{max(self.topk_group, 0) * (experts // self.n_group)} experts, fewer than "
                f"num_experts_per_tok={top_k}"
            )

    def _check_balancing(self) -> None:
        devices, experts = self.balance_devices, self.n_routed_experts
        if devices is not None and (devices < 1 or experts % devices):
            raise ValueError(f"n_routed_experts={experts} is not divisible among balance_devices={devices}")
        if not self.communication_loss_alpha:
            return
        if self.topk_method == "greedy" or devices not in (None, self.n_group):
            raise ValueError(
                f"communication_loss_alpha={self.communication_loss_alpha} needs topk_group of n_group devices for a "
                f"token, but topk_method={self.topk_method!r}, n_group={self.n_group}, balance_devices={devices}"
            )
