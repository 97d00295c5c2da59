"""The memory of a training step, from a config and a recipe alone.

Peak of a step = weights + optimizer state + the most that gradients, activations and temporaries hold together while
the layers run forward and then, in reverse, backward (`training_peak`). Weights and what is trained of them come from
the model itself (`memory_model`), the layers' activations from formulas (`memory_layers`).
"""

import dataclasses
from dataclasses import dataclass

from torch import nn

from modeling_deepseek_moe import DeepseekMoeConfig

from ..errors import RecipeError
from ..recipe.schema import Recipe
from . import layers
from .layers import FLOAT, Shape, Stage
from .model import Parameter, meta_model, parameters_of, weights_by_part

_HALF = ("bf16", "fp16")
# States of the size of the parameter in its dtype; in four bytes; in one byte with a float32 scale for each 256.
_STATES = {"adamw_torch": 2, "adamw_torch_fused": 2, "adamw_anyprecision": 2, "rmsprop": 1, "adagrad": 1, "sgd": 0}
_STATES_32 = {"paged_adamw_32bit": 2, "lion_32bit": 1, "paged_lion_32bit": 1}
_STATES_8 = {"adamw_8bit": 2, "adamw_bnb_8bit": 2, "paged_adamw_8bit": 2, "lion_8bit": 1, "paged_lion_8bit": 1}
OPTIMIZERS = (*_STATES, *_STATES_32, *_STATES_8, "adafactor")


@dataclass(frozen=True)
class StageGroup:
    """Stages that checkpointing runs again as one; `kept` is the input that it keeps, None without checkpointing."""

    stages: tuple[Stage, ...]
    kept: int | None = None


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a training step on one GPU.

    Attributes:
        weights: all parameters and buffers, frozen or trained, by part of the model.
        optimizer: its states.
        gradients, activations, temporaries: what they hold at the moment of the peak.
        all_gradients: what gradients hold when the optimizer steps.
        moment: what computes at the peak.
        trained: how many parameters are trained.
    """

    weights: dict[str, int]
    optimizer: int
    gradients: int
    activations: int
    temporaries: int
    all_gradients: int
    moment: str
    trained: int

    @property
    def static(self) -> int:
        """Weights and optimizer state, which are there all the time."""
        return sum(self.weights.values()) + self.optimizer

    @property
    def peak(self) -> int:
        """The most bytes that are in use at once."""
        return self.static + self.gradients + self.activations + self.temporaries


def training_memory(
    config: DeepseekMoeConfig,
    recipe: Recipe,
    *,
    batch: int | None = None,
    length: int | None = None,
    is_padded: bool = True,
    device: str = "cuda",
) -> Memory:
    """Memory of one optimizer step as the recipe trains the model.

    Args:
        config: the model's.
        recipe: what to train and how.
        batch, length: rows of a micro-batch and tokens of a row, if not the recipe's.
        is_padded: rows differ in length, so that attention gets a mask; a single unpacked row never does.
        device: "cuda" or "cpu".
    """
    return MemoryPlan(config, recipe, device).memory(batch, length, is_padded)


class MemoryPlan:
    """A model and a recipe, whose memory is wanted for several micro-batches.

    Args:
        config: of the model.
        recipe: what to train and how.
        device: "cuda" or "cpu", which run other kernels.
    """

    def __init__(self, config: DeepseekMoeConfig, recipe: Recipe, device: str = "cuda"):
        self.recipe, self.device = recipe, device
        self.config, self.model, self.layer_of = meta_model(config, recipe)
        self.parameters = parameters_of(self.model, self.layer_of, recipe.quantization)
        self.training = recipe.training

    @property
    def rows(self) -> int:
        """Rows of a micro-batch, as the recipe says."""
        return self.training.get("per_device_train_batch_size") or 8

    @property
    def base(self) -> nn.Module:
        """The model without its adapters' wrapper."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def accumulates(self) -> bool:
        """Whether gradients of several micro-batches add up."""
        return (self.training.get("gradient_accumulation_steps") or 1) > 1

    def shape(self, batch: int | None = None, length: int | None = None, is_padded: bool = True) -> Shape:
        """A micro-batch of `batch` rows of `length` tokens, by default the recipe's."""
        batch, length = batch or self.rows, length or self.recipe.max_length
        if self.recipe.dpo:
            batch *= 2  # the preferred and the other answer
        is_padded = self.recipe.packing or (is_padded and batch > 1)
        stream = self.base.model.embed_tokens.weight.element_size()
        is_autocast = stream == FLOAT and any(self.training.get(name) for name in _HALF)
        product = 2 if is_autocast else stream
        return Shape(batch, length, product, stream, stream, is_padded, bool(self.recipe.quantization), self.device)

    def memory(self, batch: int | None = None, length: int | None = None, is_padded: bool = True) -> Memory:
        """Memory of a step whose micro-batches have `batch` rows of `length` tokens, by default the recipe's."""
        shape = self.shape(batch, length, is_padded)
        weights = weights_by_part(self.parameters)
        trained = [p for p in self.parameters if p.is_trained]
        all_gradients = sum(p.nbytes for p in trained)
        state, scratch = optimizer_bytes(self.training.get("optim") or "adamw_torch_fused", trained, self.device)
        moments = training_peak(self.groups(self.base, shape), all_gradients if self.accumulates else 0)
        moments.append(("optimizer step", all_gradients, 0, scratch))
        moment, gradients, activations, temporaries = max(moments, key=lambda each: sum(each[1:]))
        return Memory(
            weights,
            state,
            gradients,
            activations,
            temporaries,
            all_gradients,
            moment,
            sum(p.numel for p in trained),
        )

    def groups(self, base: nn.Module, shape: Shape) -> list[StageGroup]:
        """The forward pass in order; what runs before anything is trained keeps nothing."""
        config, decoder = self.config, base.model
        kept = shape.tokens * config.hidden_size * shape.stream if self.recipe.gradient_checkpointing else None
        learns = decoder.embed_tokens.weight.requires_grad
        embedding = Stage("embedding", 0, 0, 0, layers.trained_bytes(decoder.embed_tokens))
        groups, made = [StageGroup((embedding,))], {}
        for built in self.layer_of[: config.num_hidden_layers]:
            layer = decoder.layers[built]
            if (built, learns) not in made:
                stages = []
                learned = learns
                for make in (layers.attention_stages, layers.feed_forward_stages):
                    before = here = learned
                    for stage in make(config, layer, shape):
                        here = (before if stage.begins_branch else here) or stage.gradients > 0
                        learned = learned or here
                        stages.append(stage if here else dataclasses.replace(stage, saved=0, backward=0))
                made[built, learns] = StageGroup(tuple(stages), kept if learned or kept is None else 0), learned
            group, learns = made[built, learns]
            groups.append(group)
        groups.append(StageGroup((head_stage(config, base, shape),)))
        if config.mtp_loss_weight:
            for built in self.layer_of[config.num_hidden_layers :]:
                layer = decoder.layers[built]
                stages = layers.attention_stages(config, layer, shape) + layers.feed_forward_stages(
                    config, layer, shape
                )
                groups.append(StageGroup((joined_stage(config, layer, shape), *stages), kept and 2 * kept))
                groups.append(StageGroup((dataclasses.replace(head_stage(config, base, shape), gradients=0),)))
        return groups


def training_peak(groups: list[StageGroup], accumulated: int = 0) -> list[tuple[str, int, int, int]]:
    """Every stage's forward and backward as (name, gradients, activations, temporaries) in bytes.

    Args:
        groups: the forward pass in order.
        accumulated: gradients of micro-batches before, which stay all the time; those of a stage are then temporary.
    """
    moments, alive, casts = [], 0, 0
    for group in groups:
        before = alive
        for stage in group.stages:
            moments.append((f"forward of {stage.name}", accumulated, alive + casts + stage.saved, stage.forward))
            alive += stage.saved + (stage.casts if group.kept is None else 0)
            casts += 0 if group.kept is None else stage.casts
        alive = alive if group.kept is None else before + group.kept
    gradients = accumulated
    for group in reversed(groups):
        if group.kept is not None:
            alive -= group.kept
            for stage in group.stages:
                alive += stage.saved + stage.casts
                moments.append((f"second forward of {stage.name}", gradients, alive + group.kept, stage.forward))
        for stage in reversed(group.stages):
            temporary = stage.backward + stage.gradients
            moments.append((f"backward of {stage.name}", gradients, alive + (group.kept or 0), temporary))
            alive -= stage.saved + stage.casts
            gradients += 0 if accumulated else stage.gradients
    return moments


def joined_stage(config, layer: nn.Module, shape: Shape) -> Stage:
    """How a multi-token prediction layer begins: norms of state and embedding, and the product that joins them."""
    norms = (layer.enorm, layer.hnorm, layer.shared_head.norm)
    saved = sum(layers.norm(module, config.hidden_size, shape.stream, shape) for module in norms)
    saved += layers.linear_inputs([layer.eh_proj], 2 * config.hidden_size, shape.stream, shape)
    stream = shape.tokens * config.hidden_size * shape.stream
    gradients = sum(layers.trained_bytes(module) for module in (*norms, layer.eh_proj))
    return Stage("joined inputs", saved, 3 * stream, 4 * stream, gradients)


def head_stage(config, base: nn.Module, shape: Shape) -> Stage:
    """Final norm, output head and loss (`chunked_loss.py`).

    saved     norm; its output; in chunks: the states' gradient `[N, H]` in float32, and in float32 without autocast
              also the head's `[V, H]`; else log-probabilities `[N, V]` in float32
    forward   logits of a chunk in the products' dtype and in float32
    backward  in chunks: the same for the head's gradient; else two more `[N, V]`
    """
    tokens, hidden, vocabulary = shape.tokens, config.hidden_size, config.vocab_size
    head = layers.base_of(base.lm_head)
    trains = base.lm_head.weight.requires_grad
    saved = layers.norm(base.model.norm, hidden, shape.stream, shape)
    stream, logits = tokens * hidden * shape.stream, tokens * vocabulary
    saved += stream
    gradients = layers.trained_bytes(base.model.norm) + (head.weight.numel() * head.weight.element_size() * trains)
    cast = head.weight.numel() * shape.product if shape.is_cast else 0
    # Logits as multiplied, in float32, and as multiplied again for their gradient.
    of_number = FLOAT + (2 * shape.product if shape.product != FLOAT else 0)
    if not config.loss_chunk_bytes or logits * FLOAT <= config.loss_chunk_bytes:
        saved += logits * FLOAT + cast * (not trains)
        backward = 2 * logits * FLOAT + stream
        return Stage("the loss", saved, logits * of_number, backward, gradients, cast * trains)
    chunk = min(logits, config.loss_chunk_bytes // FLOAT)
    saved += tokens * hidden * FLOAT
    held = FLOAT + (shape.product if shape.product != FLOAT else 0)
    forward = cast + chunk * held
    adds_up = trains and shape.product == FLOAT
    if adds_up:
        saved += head.weight.numel() * FLOAT
        gradients -= head.weight.numel() * FLOAT
    backward = stream + (chunk * held + stream if trains and not adds_up else 0)
    return Stage("the loss", saved, forward, backward, gradients)


def optimizer_bytes(name: str, trained: list[Parameter], device: str) -> tuple[int, int]:
    """Bytes of an optimizer's states, and of what it needs besides while it steps.

    Raises:
        RecipeError: an optimizer whose states are not known here.
    """
    largest = max((p.nbytes // p.layers for p in trained), default=0)
    total = sum(p.nbytes for p in trained)
    if name == "adafactor":
        # One number a row and a column of the last two dimensions; the update in float32 and two tensors beside it.
        rows = sum(
            (p.numel // p.shape[-1] + p.numel // p.shape[-2] if len(p.shape) > 1 else p.numel) * FLOAT for p in trained
        )
        return rows, 3 * max((p.numel // p.layers for p in trained), default=0) * FLOAT
    if name in _STATES:
        # For-each kernels, the default on GPUs, make a copy of everything; else of one parameter after the other.
        copies = {"adamw_torch_fused": 0, "sgd": 0}.get(name, total if device == "cuda" else 2 * largest)
        return _STATES[name] * total, copies
    if name in _STATES_32:
        return _STATES_32[name] * sum(p.numel for p in trained) * FLOAT, 0
    if name in _STATES_8:
        return _STATES_8[name] * sum(_in_8_bits(p) for p in trained), 0
    raise RecipeError(f"`training.optim` is {name!r}: `plan` knows {', '.join(OPTIMIZERS)}")


def _in_8_bits(parameter: Parameter) -> int:
    """bitsandbytes keeps tensors below 4096 numbers in 32 bits."""
    one = parameter.numel // parameter.layers
    return parameter.numel * FLOAT if one < 4096 else parameter.layers * (one + -(-one // 256) * FLOAT)
