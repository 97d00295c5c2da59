"""Layers in which some routed experts are trained and the others frozen: gradients exist for the former alone.

L layers, E experts, n of them chosen in a layer, H hidden size, I width of one expert.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from modeling_deepseek_moe.conversion.adapters.esft import trained_names
from modeling_deepseek_moe.experts import DeepseekMoeExperts
from modeling_deepseek_moe.kernels.sorted.experts import sorted_experts
from modeling_deepseek_moe.parts import PARTS, part_of

from .._compat import ignore_on_save
from .counting import blocks_of


class ChosenExperts(nn.Module):
    """Takes the place of a layer's experts, and trains the chosen ones.

    Their weights become parameters of their own, in float32 at least: steps of 1e-5 would be lost in bfloat16. The
    stacks stay frozen, with the chosen experts moved to the front, and get the trained values, in the model's dtype,
    before the first forward pass after a step. All products are those of `experts_implementation="sorted_mm"`,
    whatever the model's.

    Args:
        experts: a layer's, as they were loaded.
        chosen: ids of the experts to train.

    Attributes:
        gate_up, down: weights of the chosen experts, in their order, `[n, 2I, H]` and `[n, H, I]`. By the names of
            the stacks `save_pretrained` would take them for all experts.
        place: each expert's place in the stacks, `[E + 1]`; the last stands for one that another rank serves.
    """

    def __init__(self, experts: DeepseekMoeExperts, chosen: list[int]):
        super().__init__()
        self.experts = experts.requires_grad_(False)
        self.chosen = list(chosen)
        self.order = list(range(experts.num_experts))
        for place, expert in enumerate(chosen):
            other = self.order.index(expert)
            self.order[place], self.order[other] = self.order[other], self.order[place]
        places = torch.tensor([*self.order, experts.num_experts]).argsort()
        self.place = nn.Buffer(places.to(experts.gate_up_proj.device), persistent=False)
        moved = [place for place, expert in enumerate(self.order) if place != expert]
        self._move([self.order[place] for place in moved], moved)
        self.gate_up, self.down = (nn.Parameter(_master(stack[: len(chosen)])) for stack in self._stacks())
        self._may_be_behind = False
        self.register_load_state_dict_post_hook(_stacks_are_behind)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The experts' output `[N, H]`; arguments are those of `DeepseekMoeExperts.forward`."""
        if self._may_be_behind:
            self.refresh()
        # No version counter tells: fused optimizers leave it as it is.
        self._may_be_behind = torch.is_grad_enabled() or self.gate_up.grad is not None
        places, trained = self.place[top_k_index], (self.gate_up, self.down)
        return sorted_experts(self.experts, hidden_states, places, top_k_weights, trained=trained)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copies the trained values into the stacks; `forward` does where a step may have changed them."""
        for stack, trained in zip(self._stacks(), (self.gate_up, self.down), strict=True):
            stack[: len(trained)].copy_(trained)

    def released(self) -> DeepseekMoeExperts:
        """The layer's experts with the trained values, each in its own place; this module is of no use afterwards."""
        self.refresh()
        moved = [place for place, expert in enumerate(self.order) if place != expert]
        self._move(moved, [self.order[place] for place in moved])
        return self.experts

    def _stacks(self) -> tuple[nn.Parameter, nn.Parameter]:
        return self.experts.gate_up_proj, self.experts.down_proj

    @torch.no_grad()
    def _move(self, sources: list[int], targets: list[int]) -> None:
        for stack in self._stacks():
            stack[targets] = stack[sources]

    def extra_repr(self) -> str:
        return f"trained={self.chosen}"


def train_chosen(model: PreTrainedModel, expert_cfg: Mapping[str, Any]) -> None:
    """Freezes the model but for what an `expert_cfg.json` names, and puts `ChosenExperts` where it names experts.

    `release` undoes it. Until then `model.state_dict()` has other names than a checkpoint.

    Args:
        model: the model as it was loaded, with `layers`; it is changed.
        expert_cfg: what the file holds, fit for this model.
    """
    model.requires_grad_(False)
    for layer, block in blocks_of(model).items():
        if chosen := expert_cfg["experts"].get(str(layer)):
            block.experts = ChosenExperts(block.experts, chosen)
    others = {name: parameter for name, parameter in model.named_parameters() if not _is_routed(name)}
    for name in trained_names(expert_cfg, others):
        others[name].requires_grad_(True)
    model.freeze_idle_mtp()
    model.expert_cfg = dict(expert_cfg)
    # What the Trainer then misses in a checkpoint when it goes on from one, it may miss.
    ignore_on_save(model, model.state_dict().keys() - trained_state(model).keys())


def is_specialized(model: nn.Module) -> bool:
    """Whether `train_chosen` prepared the model."""
    return getattr(model, "expert_cfg", None) is not None


def trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """What a checkpoint of a model in training needs: its trained parameters, and its routers' biases."""
    state = model.state_dict(keep_vars=True)
    return {name: tensor.detach() for name, tensor in state.items() if _may_change(tensor)}


def release(model: PreTrainedModel) -> PreTrainedModel:
    """Makes a model that `train_chosen` prepared an ordinary one, with what it learned, and returns it."""
    for block in blocks_of(model).values():
        if isinstance(block.experts, ChosenExperts):
            block.experts = block.experts.released()
    del model.expert_cfg
    ignore_on_save(model, ())
    return model


def published_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The values of a model, in training or not, under the names of a checkpoint; writing to them changes the model.

    Raises:
        ValueError: the model is no causal language model, or its experts are quantised or have adapters.
    """
    state = model.state_dict()
    if "model.embed_tokens.weight" not in state:
        raise ValueError(f"{type(model).__name__} has no tensors of the names that an ESFT adapter has")
    tensors = {name: tensor for name, tensor in state.items() if not _is_routed(name)}
    for layer, block in blocks_of(model).items():
        experts, places = block.experts, range(model.config.n_routed_experts)
        if isinstance(experts, ChosenExperts):
            experts.refresh()
            experts, places = experts.experts, experts.place.tolist()[:-1]
        if not isinstance(experts, DeepseekMoeExperts):
            raise ValueError(f"the experts of layer {layer} are {type(experts).__name__}, whose weights are not plain")
        for expert, place in enumerate(places):
            gate, up = experts.gate_up_proj.detach()[place].chunk(2)
            parts = {"gate": gate, "up": up, "down": experts.down_proj.detach()[place]}
            name = f"model.layers.{layer}.{PARTS['routed_experts'].place}.{expert}.{{}}_proj.weight"
            tensors |= {name.format(part): tensor for part, tensor in parts.items()}
    return tensors


def _stacks_are_behind(experts: ChosenExperts, _: Any) -> None:
    experts._may_be_behind = True


def _is_routed(name: str) -> bool:
    return part_of(name) == "routed_experts"


def _master(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True)


def _may_change(tensor: torch.Tensor) -> bool:
    return tensor.requires_grad or not isinstance(tensor, nn.Parameter)
