"""What each rank holds when a model is spread over several, by the sharding code of transformers and torch.

One process imagines all ranks: torch's fake backend, whose collectives do nothing, and a model on the meta device. So
placements are those of training; what the other ranks hold of them torch's own rule for chunks says.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from modeling_deepseek_moe import DeepseekMoeConfig, DeepseekMoeForCausalLM

from .._compat import cuts_inside_experts, imagined_ranks, spreading
from ..errors import UserError, first_line
from ..recipe.schema import Recipe
from .model import Parameter, meta_model, parameters_of

# Mesh dimensions over which FSDP gathers a parameter before it computes; others compute with their part.
GATHERED = ("fsdp", "efsdp")


@dataclass(frozen=True)
class Layout:
    """How ranks share a model out: `shard x replicate x tp` of them, over which experts are spread by `ep`.

    Attributes:
        shard: ranks that cut every parameter between them (FSDP).
        replicate: groups of them that hold the same (HSDP); with `shard` 1, DDP.
        ep: ranks that share the routed experts out whole; divides `shard x tp`.
        tp: ranks that compute one batch together, each with a part of every matrix.
        inside_experts: FSDP cuts stacked experts on their second dimension and not on the first.
    """

    shard: int = 1
    replicate: int = 1
    ep: int = 1
    tp: int = 1
    inside_experts: bool = False

    @property
    def ranks(self) -> int:
        """How many there are."""
        return self.shard * self.replicate * self.tp

    @property
    def name(self) -> str:
        """What people call it."""
        if self.is_ddp:
            return "DDP"
        words = [f"EP {self.ep}"] if self.ep > 1 else []
        words += [f"TP {self.tp}"] if self.tp > 1 else []
        if self.replicate > 1:
            words.append(f"HSDP {self.replicate}x{self.shard}")
        elif self.shard > 1:
            words.append(f"FSDP {self.shard}")
        return " x ".join(words) + (", Shard(1)" if self.inside_experts else "")

    @property
    def is_ddp(self) -> bool:
        """Whether every rank holds the whole model."""
        return self.shard == self.tp == self.ep == 1

    @property
    def line(self) -> str:
        """The recipe's line for it; "" for DDP, which processes do without one."""
        if self.is_ddp:
            return ""
        return f"parallel: {{shard: {self.shard}, replicate: {self.replicate}, ep: {self.ep}, tp: {self.tp}}}"

    def fields(self) -> dict[str, int]:
        """Those of `DistributedConfig` that differ from its defaults; DDP needs none."""
        if self.is_ddp:
            return {}
        sizes = {"fsdp_size": self.shard, "dp_replicate_size": self.replicate, "ep_size": self.ep, "tp_size": self.tp}
        return {name: size for name, size in sizes.items() if size > 1}

    def leaves_ranks_without(self, experts: int | None) -> bool:
        """Whether FSDP over the first dimension of so many stacked experts has nothing for some ranks."""
        return bool(experts) and self.shard * (self.tp if self.ep > 1 else 1) > experts


@dataclass(frozen=True)
class Spread:
    """A parameter, or those of its name in like layers, on all ranks.

    Attributes:
        whole: of the model.
        computed: what a rank computes with: cut by expert and tensor parallelism, gathered by FSDP.
        numel: how many numbers each rank holds in one layer.
        is_gathered: FSDP makes it whole to compute with it; a copy of its own also where it has it whole already.
        over: ranks that FSDP gathers it from.
        copies: ranks that hold the same numbers.
        is_expert: of the routed experts, cut over the ranks of the experts' mesh.
        is_idle: no training step computes with it.
    """

    whole: Parameter
    computed: Parameter
    numel: tuple[int, ...]
    is_gathered: bool
    over: int
    copies: int
    is_expert: bool
    is_idle: bool = False

    def on(self, rank: int) -> Parameter:
        """What a rank holds, as a flat parameter."""
        whole = self.whole
        return Parameter(whole.name, (self.numel[rank],), whole.itemsize, whole.is_trained, whole.layers)

    def bytes_on(self, rank: int) -> int:
        """Bytes that a rank holds in all layers."""
        return self.on(rank).nbytes


@contextlib.contextmanager
def spread_by(layout: Layout, rank: int = 0) -> Iterator[Callable[[nn.Module], nn.Module]]:
    """In it, what spreads a model on the meta device as the layout says, in the place of one of its ranks.

    Raises:
        UserError: this process is in a group already, or there is no such layout.
    """
    if torch.distributed.is_initialized():
        raise UserError("layouts are planned by one process that is in no process group: call `plan` without torchrun")
    cuts = cuts_inside_experts() if layout.inside_experts else contextlib.nullcontext()
    with imagined_ranks(layout.ranks, rank), cuts:
        try:
            yield spreading(DeepseekMoeForCausalLM, layout.fields())
        except (ValueError, TypeError, NotImplementedError) as error:
            raise UserError(f"{layout.name}: {first_line(error)}") from error


def spreads_of(config: DeepseekMoeConfig, recipe: Recipe, layout: Layout) -> list[Spread]:
    """Every parameter and buffer of the model, as the recipe trains it, on all ranks.

    Raises:
        UserError: as `spread_by`; or the recipe's adapters do not go with the layout.
    """
    with spread_by(layout) as spread:
        config, model, layer_of = meta_model(config, recipe, spread)
        tensors = dict([*model.named_parameters(), *model.named_buffers()])
        spreads = [_spread(each, tensors[each.name], layout) for each in parameters_of(model, layer_of)]
    # Layers for multi-token prediction lie idle without their loss.
    further = {f"layers.{layer}." for layer in layer_of[config.num_hidden_layers :] if not config.mtp_loss_weight}
    return [
        dataclasses.replace(each, is_idle=any(f".{name}" in each.whole.name for name in further)) for each in spreads
    ]


def _spread(whole: Parameter, tensor: torch.Tensor, layout: Layout) -> Spread:
    if not isinstance(tensor, DTensor):
        return Spread(whole, whole, (torch.Size(whole.shape).numel(),) * layout.ranks, False, 1, layout.ranks, False)
    experts_mesh = layout.shard * layout.tp // layout.ep
    sizes = {"dp_replicate": layout.replicate, "fsdp": layout.shard, "tp": layout.tp}
    is_expert = not {"ep", "efsdp"}.isdisjoint(tensor.device_mesh.mesh_dim_names)
    if is_expert:
        sizes = {"dp_replicate": layout.replicate, "efsdp": experts_mesh, "ep": layout.ep}
    # FSDP cuts what expert or tensor parallelism has left of a dimension, and stands before them in the mesh.
    cuts = [
        (name, placement.dim)
        for name, placement in zip(tensor.device_mesh.mesh_dim_names, tensor.placements, strict=True)
        if hasattr(placement, "dim")
    ][::-1]
    computed = list(whole.shape)
    for name, dim in cuts:
        if name not in GATHERED:
            computed[dim] = _chunk(computed[dim], sizes[name], 0)
    numel = []
    for rank in range(layout.ranks):
        place = dict(zip(sizes, _unraveled(rank, tuple(sizes.values())), strict=True))
        shape = list(whole.shape)
        for name, dim in cuts:
            shape[dim] = _chunk(shape[dim], sizes[name], place[name])
        numel.append(math.prod(shape))
    over = math.prod(sizes[name] for name, _ in cuts if name in GATHERED)
    copies = layout.ranks // math.prod(sizes[name] for name, _ in cuts)
    piece = Parameter(whole.name, tuple(computed), whole.itemsize, whole.is_trained, whole.layers)
    is_gathered = any(name in GATHERED for name, _ in cuts)
    return Spread(whole, piece, tuple(numel), is_gathered, over, copies, is_expert)


def _unraveled(rank: int, sizes: tuple[int, ...]) -> list[int]:
    place = []
    for size in reversed(sizes):
        rank, coordinate = divmod(rank, size)
        place.append(coordinate)
    return place[::-1]


@functools.cache
def _chunk(size: int, ranks: int, rank: int) -> int:
    return Shard.local_shard_size_and_offset(size, ranks, rank)[0]
