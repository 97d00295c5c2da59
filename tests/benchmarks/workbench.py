"""What is compared: this package's model and transformers' own, on the very same tensors, routed alike."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from measure import agreement
from routing import NUM_EXPERTS, TOP_K, Routing, read_routing
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    Glm4MoeLiteConfig,
    Glm4MoeLiteForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.glm4_moe_lite.modeling_glm4_moe_lite import Glm4MoeLiteTopkRouter

from modeling_deepseek_moe import DeepseekMoeConfig, DeepseekMoeForCausalLM
from modeling_deepseek_moe.presets import released_json
from modeling_deepseek_moe.router import DeepseekMoeRouter

# Largest difference of two logits over the largest logit: roundings of one and the same sums in another order.
LOGIT_BOUND = {torch.bfloat16: 0.03, torch.float32: 1e-3}

_TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 16,
    "num_attention_heads": 2,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


@dataclass(frozen=True)
class Size:
    """The model whose sizes are measured, and transformers' class of it.

    Attributes:
        preset: the released model.
        config_class, model_class: transformers' own.
        overrides: fields that make it tiny.
        top_k: experts of a token.
        tiny: the tiny size of the same model.
        has_goals: whether the goals of the rows are this model's.
    """

    preset: str
    config_class: type[PreTrainedConfig]
    model_class: type[PreTrainedModel]
    overrides: dict
    top_k: int
    tiny: str
    has_goals: bool

    @property
    def is_tiny(self) -> bool:
        return bool(self.overrides)


def _sizes() -> dict[str, Size]:
    v2 = ("deepseek-v2-lite", DeepseekV2Config, DeepseekV2ForCausalLM)
    glm = ("glm-4.7-flash", Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM)
    tiny_glm = {**_TINY, "num_key_value_heads": 2, "q_lora_rank": 32}
    return {
        "v2-lite": Size(*v2, {}, TOP_K, "tiny", has_goals=True),
        "tiny": Size(*v2, _TINY, TOP_K, "tiny", has_goals=True),
        "glm-4.7-flash": Size(*glm, {}, 4, "tiny-glm", has_goals=False),
        "tiny-glm": Size(*glm, tiny_glm, 4, "tiny-glm", has_goals=False),
    }


SIZES = _sizes()
_ROUTERS = (DeepseekMoeRouter, DeepseekV2TopkRouter, Glm4MoeLiteTopkRouter)


@dataclass(frozen=True)
class Settings:
    """What the command line says; `contexts` are token counts."""

    size: str
    layers: int
    threads: int
    repeats: int
    contexts: tuple[int, ...]
    routing: Path | None

    def read_routing(self) -> Routing:
        """Raises `RoutingFileError`."""
        tokens = None if self.routing is None else read_routing(self.routing)
        return Routing(NUM_EXPERTS, SIZES[self.size].top_k, tokens)


class Side:
    """One model, whose routers choose what they are told.

    Routers compute their logits as ever; the weights of a token are its scores at the chosen experts, of a router with
    a selection bias normalised and scaled as it does.
    """

    def __init__(self, model: PreTrainedModel, routing: Routing):
        self.model, self.routing, self._choices = model, routing, {}
        self.routers = [m for m in model.modules() if isinstance(m, _ROUTERS)]
        for router in self.routers:
            router.register_forward_hook(self._choose)

    def route(self, tokens: int, seed: int) -> None:
        """What the next passes over `tokens` tokens choose, each layer its own."""
        self._choices = {
            router: self.routing.draw(tokens, len(self.routers) * seed + layer)
            for layer, router in enumerate(self.routers)
        }

    @property
    def experts(self) -> str:
        """The name of the implementation in use."""
        return self.model.config._experts_implementation

    @property
    def moe(self) -> torch.nn.Module:
        """The first DeepSeekMoE block."""
        return next(layer.mlp for layer in self.model.model.layers if hasattr(layer.mlp, "experts"))

    def _choose(self, router, args, output):
        logits, _, _ = output
        choice = self._choices[router]
        if getattr(router, "e_score_correction_bias", None) is None:
            return logits, logits.softmax(dim=-1).gather(1, choice), choice
        weights = logits.sigmoid().gather(1, choice)
        scale = self.model.config.routed_scaling_factor
        return logits, weights / weights.sum(dim=-1, keepdim=True) * scale, choice


class Workbench:
    """Builds both sides once for a dtype and keeps them until released."""

    def __init__(self, settings: Settings):
        self.settings, self.size = settings, SIZES[settings.size]
        self.routing = settings.read_routing()
        self.fields = {
            **released_json(self.size.preset),
            **self.size.overrides,
            "num_hidden_layers": settings.layers,
            "num_nextn_predict_layers": 0,
            "aux_loss_alpha": 0.0,  # transformers' class has no balance loss
        }
        self._pairs: dict[torch.dtype, tuple[Side, Side]] = {}

    def tokens(self, count: int) -> int:
        """`count` at full size, fewer when tiny."""
        return count if not self.size.is_tiny else max(1, count // 16)

    def ids(self, tokens: int, seed: int) -> torch.Tensor:
        """`[1, tokens]` random token ids."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(self.fields["vocab_size"], (1, tokens), generator=generator)

    def pair(self, dtype: torch.dtype = torch.bfloat16) -> tuple[Side, Side]:
        """This package's side and transformers', which share every parameter object, in eval mode and frozen.

        Raises:
            DisagreementError: their logits differ.
        """
        if dtype not in self._pairs:
            # Parameters made under inference mode could never be trained.
            with torch.inference_mode(False):
                ours = self.build_ours(dtype)
                theirs = self.theirs_on(ours.model)
            self._pairs[dtype] = ours, theirs
            self.check_logits(ours, theirs)
        for side in self._pairs[dtype]:
            side.model.eval().requires_grad_(False)
        return self._pairs[dtype]

    def release(self, dtype: torch.dtype) -> None:
        """Frees the pair of this dtype."""
        self._pairs.pop(dtype, None)

    def build_ours(self, dtype: torch.dtype) -> Side:
        """This package's model with random weights; normed states times weights of this size give logits near 1."""
        config = DeepseekMoeConfig.from_dict(self.fields)
        torch.manual_seed(0)
        return Side(AutoModelForCausalLM.from_config(config, dtype=dtype), self.routing)

    def ours_on(self, source: PreTrainedModel) -> Side:
        """This package's model on the tensors of `source`."""
        return Side(_on(DeepseekMoeForCausalLM, DeepseekMoeConfig.from_dict(self.fields), source), self.routing)

    def theirs_on(self, source: PreTrainedModel, experts: str = "grouped_mm") -> Side:
        """transformers' model with its best settings on the tensors of `source`."""
        model = _on(self.size.model_class, self.size.config_class.from_dict(self.fields), source)
        model.set_attn_implementation("sdpa")
        model.set_experts_implementation(experts)
        return Side(model, self.routing)

    @torch.inference_mode()
    def check_logits(self, ours: Side, theirs: Side, tokens: int = 64) -> dict[str, float]:
        """The difference of both sides' logits over the largest."""
        logits = []
        for side in (ours, theirs):
            side.model.eval()
            side.route(tokens, seed=0)
            logits.append(side.model(self.ids(tokens, seed=0)).logits)
        return agreement("logits", *logits, LOGIT_BOUND[logits[0].dtype])


def _on(model_class, config, source: PreTrainedModel) -> PreTrainedModel:
    with torch.device("meta"):
        model = model_class(config)
    model.load_state_dict(source.state_dict(keep_vars=True), assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # computed, in no state dict
    return model.eval()
