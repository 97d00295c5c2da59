"""What is compared: this package's model and transformers' own, on the very same tensors, routed alike."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from measure import agreement
from routing import NUM_EXPERTS, TOP_K, Routing, read_routing
from transformers import AutoModelForCausalLM, DeepseekV2Config, DeepseekV2ForCausalLM, PreTrainedModel
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter

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
SIZES = {"v2-lite": {}, "tiny": _TINY}


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
        return Routing(NUM_EXPERTS, TOP_K, tokens)


class Side:
    """One model, whose routers choose what they are told.

    Routers compute their logits as ever; the weights of a token are its scores at the chosen experts.
    """

    def __init__(self, model: PreTrainedModel, routing: Routing):
        self.model, self.routing, self._choices = model, routing, {}
        self.routers = [m for m in model.modules() if isinstance(m, (DeepseekMoeRouter, DeepseekV2TopkRouter))]
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
        return self.model.model.layers[self.model.config.first_k_dense_replace].mlp

    def _choose(self, router, args, output):
        logits, _, _ = output
        choice = self._choices[router]
        return logits, logits.softmax(dim=-1).gather(1, choice), choice


class Workbench:
    """Builds both sides once for a dtype and keeps them until released."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.routing = settings.read_routing()
        self.fields = {
            **released_json("deepseek-v2-lite"),
            **SIZES[settings.size],
            "num_hidden_layers": settings.layers,
            "aux_loss_alpha": 0.0,  # transformers' class has no balance loss
        }
        self._pairs: dict[torch.dtype, tuple[Side, Side]] = {}

    def tokens(self, count: int) -> int:
        """`count` at full size, fewer when tiny."""
        return count if self.settings.size != "tiny" else max(1, count // 16)

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
        model = _on(DeepseekV2ForCausalLM, DeepseekV2Config.from_dict(self.fields), source)
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
