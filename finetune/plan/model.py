"""The model as a recipe trains it: on the meta device, without data, with the adapters that training would give it."""

import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modeling_deepseek_moe import CheckpointError, DeepseekMoeConfig, DeepseekMoeForCausalLM
from modeling_deepseek_moe.conversion.adapters.esft import read_expert_cfg
from modeling_deepseek_moe.expert_lora_start import changes_base
from modeling_deepseek_moe.parts import part_of
from modeling_deepseek_moe.quantized.weights import BITS, is_quantized

from ..errors import RecipeError
from ..model.chosen_experts import train_chosen
from ..model.load import add_adapters
from ..recipe.schema import EsftOptions, Recipe

# Share of a layer's experts, in the mean: stored parameters of the paper's runs on DeepSeek-V2-Lite (FACTS 5.3).
ESFT_SHARES = {"token": 0.09, "gate": 0.112}


@dataclass(frozen=True)
class Parameter:
    """Parameters of one name in `layers` like layers: shape, bytes of a number, and whether they are trained."""

    name: str
    shape: tuple[int, ...]
    itemsize: float
    is_trained: bool
    layers: int = 1

    @property
    def numel(self) -> int:
        """Numbers in all layers."""
        return torch.Size(self.shape).numel() * self.layers

    @property
    def nbytes(self) -> int:
        """Bytes in all layers."""
        return int(self.numel * self.itemsize)


def meta_model(
    config: DeepseekMoeConfig, recipe: Recipe, spread: Callable[[nn.Module], nn.Module] | None = None
) -> tuple[DeepseekMoeConfig, nn.Module, list[int]]:
    """The model as the recipe trains it, without data, and for each layer the one of the model that stands for it.

    Layers of one kind are alike, so one of each kind is built, unless the recipe tells layers apart.

    Args:
        config: of the model.
        recipe: what to train.
        spread: what several ranks make of the model before it gets its adapters.
    """
    if recipe.lora.get("layer_replication"):
        raise RecipeError(
            "`lora.layer_replication` makes another model, whose memory `plan` does not know: leave it out"
        )
    config = copy.deepcopy(config)
    for key, value in recipe.losses.items():
        setattr(config, key, value)
    depth, further = config.num_hidden_layers, config.num_nextn_predict_layers
    kinds = [config.is_moe_layer(layer) for layer in range(depth)]
    needed = depth
    if not any(recipe.lora.get(key) for key in ("layers_to_transform", "rank_pattern", "alpha_pattern")):
        needed = max(kinds.index(kind) for kind in set(kinds)) + 1
    built = copy.deepcopy(config)
    built.num_hidden_layers, built.num_nextn_predict_layers = needed, min(further, 1)
    dtype = config.dtype if recipe.dtype == "auto" else recipe.dtype
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32
    with torch.device("meta"):
        model = DeepseekMoeForCausalLM(built).to(dtype)
    model = model if spread is None else spread(model)
    layer_of = [layer if needed == depth else kinds.index(kinds[layer]) for layer in range(depth)]
    if recipe.esft:
        train_chosen(model, assumed_choice(built, recipe))
    else:
        # On the meta device there are no weights to start from; the sizes are the same.
        started = changes_base(recipe.lora.get("init_lora_weights"))
        lora = recipe.lora | ({"init_lora_weights": True} if started else {})
        model = add_adapters(model, dataclasses.replace(recipe, lora=lora))
    return config, model, [*layer_of, *[needed] * further]


def assumed_choice(config: DeepseekMoeConfig, recipe: Recipe) -> dict[str, Any]:
    """An `expert_cfg.json` with as many experts a layer as the recipe's has in the mean, or as the paper found."""
    moe_layers = [layer for layer in range(config.num_hidden_layers) if config.is_moe_layer(layer)]
    options = EsftOptions(**recipe.esft)
    others = {"shared_experts": options.shared_experts, "non_expert_modules": options.non_expert_modules}
    count = math.ceil(config.n_routed_experts * ESFT_SHARES[options.score])
    if options.experts:
        try:
            choice = read_expert_cfg(Path(options.experts).expanduser())
        except (CheckpointError, OSError) as error:
            raise RecipeError(f"`esft.experts`: {error}") from error
        others = {key: choice[key] for key in others}
        count = math.ceil(sum(map(len, choice["experts"].values())) / max(1, len(choice["experts"])))
    return {"experts": {str(layer): list(range(count)) for layer in moe_layers}, **others}


# The parts of the model as the plan lists them; all others are one line.
_TITLES = {
    "routed_experts": "routed experts",
    "attention": "attention",
    "shared_experts": "shared experts",
    "dense_mlp": "dense layers",
}


def parameters_of(model: nn.Module, layer_of: list[int], quantization: str | None = None) -> list[Parameter]:
    """Every parameter and buffer, those of a layer with how many layers it stands for."""
    found = []
    for named, is_buffer in ((model.named_parameters(), False), (model.named_buffers(), True)):
        for name, tensor in named:
            _, inside, rest = name.partition(".layers.")
            count = layer_of.count(int(rest.partition(".")[0])) if inside else 1
            if not count:
                continue
            trained = tensor.requires_grad and not is_buffer
            in_four_bits = bool(quantization) and is_quantized(name.replace(".base_layer", ""))
            itemsize = BITS / 8 if in_four_bits else tensor.element_size()
            found.append(Parameter(name, tuple(tensor.shape), itemsize, trained, count))
    return found


def weights_by_part(parameters: list[Parameter]) -> dict[str, int]:
    """Bytes of the weights by the part of the model that they are in."""
    parts: dict[str, int] = {}
    for parameter in parameters:
        title = _TITLES.get(part_of(parameter.name), "embedding, head, norms, routers")
        title = "adapters" if ".lora_" in parameter.name else title
        parts[title] = parts.get(title, 0) + parameter.nbytes
    return parts
