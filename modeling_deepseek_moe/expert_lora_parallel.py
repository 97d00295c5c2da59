"""LoRA on routed experts that are spread over ranks: expert parallelism of transformers' `DistributedConfig`.

A rank has the factors of its own experts, as DTensors on the mesh `ep`: of E experts of rank r,

    A [E r, in]    Shard(0)                            the ranks of one expert are neighbours
    B [out, r E]   _StridedShard(1, split_factor=r)    the experts are innermost

so that their local parts are laid out as PEFT lays out a layer of so many experts, and the whole as PEFT saves it.

The experts' own forward runs, and with it FSDP's gathering and the exchange of tokens; it computes by a body that has
the adapters in its hands. The ranks of an ep group see different rows, whose gradients meet at the expert. Ranks that
hold copies of the same factors, those of the meshes `efsdp` and `dp_replicate`, average theirs when a backward pass is
through: the average over C copies of sums over `ep_size / tp_size` batches each, times `tp_size / ep_size`, is the
average over all batches, as FSDP makes it of every other gradient.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from accelerate.state import GradientState
from peft.tuners import lora
from torch import distributed, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from ._compat import distributed_config, is_dtensor, strided_shard, with_experts_body
from .kernels.sorted.low_rank import Adapter

_COPIES = ("dp_replicate", "efsdp")
Body = Callable[..., torch.Tensor]


class Layout(NamedTuple):
    """Where the factors of one experts module lie.

    Attributes:
        mesh: of the ranks that have different experts.
        copies: groups of ranks that have the same ones, one for each mesh dimension of more than one rank.
        share: `tp_size / ep_size`, what a gradient of one ep group counts in the average over all batches.
    """

    mesh: "distributed.DeviceMesh"
    copies: tuple[ProcessGroup, ...]
    share: float


def layout_of(experts: nn.Module, parameter_name: str) -> Layout:
    """The layout of an experts module.

    Args:
        experts: are expert parallel, and not gathered.
        parameter_name: of a stacked weight.

    Raises:
        ValueError: the module's config does not say how the model is spread, or its weight is not.
    """
    config = distributed_config(experts.config)
    if config is None:
        raise ValueError(
            f"LoRA on routed experts: {type(experts).__name__} is expert parallel, and its "
            f"{type(experts.config).__name__} has no distributed_config, as that of a part of a larger model: load it "
            "by itself, or without ep_size"
        )
    weight = getattr(experts, parameter_name)
    if not is_dtensor(weight):
        raise ValueError(
            f"LoRA on routed experts: {parameter_name} of expert parallel {type(experts).__name__} is a "
            f"{type(weight.data).__name__} and no DTensor: load the model without quantization"
        )
    mesh = weight.device_mesh
    copies = tuple(mesh[name].get_group() for name in _COPIES if name in mesh.mesh_dim_names and mesh[name].size() > 1)
    return Layout(mesh["ep"], copies, config.tp_size / config.ep_size)


@torch.no_grad()
def spread_factors(wrapper: lora.ParamWrapper, adapter_name: str, layout: Layout) -> None:
    """Puts DTensors in the place of an adapter's whole factors, as the first rank with the same experts had them."""
    linears = (wrapper.lora_A[adapter_name], wrapper.lora_B[adapter_name])
    for linear, placement in zip(linears, (Shard(0), strided_shard(1, wrapper.r[adapter_name])), strict=True):
        factor = distribute_tensor(linear.weight.detach(), layout.mesh, [placement], src_data_rank=None)
        if not factor.is_meta:
            for group in layout.copies:
                distributed.broadcast(factor.to_local(), group=group, group_src=0)
        linear.weight = nn.Parameter(factor, requires_grad=linear.weight.requires_grad)


def local_factors(wrapper: lora.ParamWrapper, adapter_name: str, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """A `[E r, in]` and B `[out, r E]` of this rank's E experts; their gradients become those of all batches."""
    linears = wrapper.lora_A[adapter_name], wrapper.lora_B[adapter_name]
    A, B = (_local(linear.weight, layout) for linear in linears)
    return A, B


def run_adapted(
    experts: nn.Module, body: Body, adapters: Sequence[Sequence[Adapter]], *inputs: torch.Tensor
) -> torch.Tensor:
    """What the experts make of their inputs, wherever the tokens are served, with adapters.

    Args:
        experts: are expert parallel.
        body: `sorted_experts` or one that takes the same.
        adapters: of gate_up and of down, those of this rank's experts.
        *inputs: `hidden_states [N, H], top_k_index [N, K], top_k_weights [N, K]`.
    """
    with with_experts_body(experts, lambda *local_inputs: body(*local_inputs, *adapters)):
        return experts(*inputs)


def _local(factor: nn.Parameter, layout: Layout) -> torch.Tensor:
    local = factor.to_local()
    if torch.is_grad_enabled() and factor.requires_grad:
        if layout.share != 1:
            local.register_hook(lambda gradient: gradient * layout.share)
        if layout.copies and not hasattr(factor, "averages_copies"):
            factor.register_post_accumulate_grad_hook(_average_over(layout.copies))
            factor.averages_copies = True
    return local


def _average_over(groups: tuple[ProcessGroup, ...]) -> Callable[[DTensor], None]:
    """A hook that is right after every micro-batch, and spared until the last one where accelerate counts them."""

    def average(factor: DTensor) -> None:
        if GradientState().sync_gradients:
            for group in groups:
                distributed.all_reduce(factor.grad.to_local(), op=distributed.ReduceOp.AVG, group=group)

    return average
