"""What a training step needs on each rank of several layouts, what the ranks send, and which layout to take.

The shares of weights, gradients and optimizer state are those of `ranks`, on the rank that holds most. Activations are
those of one GPU (`memory`), where experts or matrices are shared out with their part of these. What a rank sends is in
`traffic`.
"""

import copy
import dataclasses
import math
from dataclasses import dataclass

from modeling_deepseek_moe import DeepseekMoeConfig

from ..errors import UserError
from ..recipe.schema import Recipe
from .fit import CUDA_CONTEXT, FRAGMENTATION, GIB, gathered
from .memory import MemoryPlan, optimizer_bytes, training_peak
from .ranks import Layout, Spread, spreads_of
from .traffic import MACHINE, Traffic, traffic_of

USUAL = 80 * GIB
# Bytes a second that a GPU of a DGX H100 sends inside its machine and out of it, by its maker. They only rank layouts.
INSIDE, OUTSIDE = 450e9, 50e9
MOST_RANKS = 2048


@dataclass(frozen=True)
class RankNeed:
    """A layout, and what its fullest rank needs in a step of one micro-batch, in bytes.

    Attributes:
        layout: of the ranks.
        weights, gradients, optimizer: that it holds.
        gathered: whole layers that FSDP gathers to compute, or DDP's copy of the gradients.
        activations: of the moment that needs most, with what comes and goes.
        estimates: CUDA's own memory, and gaps between tensors.
        fullest: number of that rank.
        traffic: what each rank sends.
    """

    layout: Layout
    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    estimates: int
    fullest: int
    traffic: tuple[Traffic, ...]

    @property
    def total(self) -> int:
        """Bytes of everything."""
        of_states = self.weights + self.gradients + self.optimizer
        return of_states + self.gathered + self.activations + self.estimates

    @property
    def sent(self) -> int:
        """Bytes that a rank sends."""
        return sum(each.sent for each in self.traffic)

    @property
    def outside(self) -> int:
        """Of these, bytes that leave the machine."""
        return sum(each.outside for each in self.traffic)

    @property
    def seconds(self) -> float:
        """Time that links of a DGX H100 take for what is sent for one rank's share of the batch.

        It ranks layouts and foretells no step. Ranks of tensor parallelism get through one micro-batch together.
        """
        return ((self.sent - self.outside) / INSIDE + self.outside / OUTSIDE) * self.layout.tp


def has_layouts(recipe: Recipe) -> bool:
    """Whether layouts can be planned for the recipe: it trains all weights or LoRA, in one pass over each batch."""
    return recipe.quantization is None and not recipe.esft and not recipe.dpo


def candidates(config: DeepseekMoeConfig, ranks: int) -> list[Layout]:
    """Layouts worth planning for so many ranks.

    Experts are shared out over a machine or over as many ranks as divide them; replicas are whole machines; tensor
    parallelism stays within one. FSDP cuts experts inside where some ranks would have none.
    """
    found = [Layout(replicate=ranks)]
    experts = config.n_routed_experts or 0
    for shard in {ranks, *(size for size in (MACHINE, 8 * MACHINE) if size < ranks and ranks % size == 0)}:
        spans = [ep for ep in range(1, shard + 1) if experts and shard % ep == 0 and experts % ep == 0]
        wide = max((ep for ep in spans if ep <= MACHINE), default=1)
        for ep in sorted({1, wide, max(spans, default=1)}):
            found.append(Layout(shard=shard, replicate=ranks // shard, ep=ep))
    widths = (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size)
    tp = math.gcd(*widths, config.moe_intermediate_size, ranks, MACHINE)
    if tp > 1 and not config.mtp_loss_weight:  # whose traffic is not known
        found.append(Layout(shard=ranks // tp, tp=tp))
    inside = [dataclasses.replace(each, inside_experts=True) for each in found if each.leaves_ranks_without(experts)]
    return [*found, *inside]


def plan_layouts(config: DeepseekMoeConfig, recipe: Recipe, ranks: int) -> list[RankNeed]:
    """What each of the layouts needs that model, recipe and torch can have, the one that sends least first.

    Raises:
        UserError: the recipe is none that layouts are planned for, or there are too many ranks.
    """
    if ranks > MOST_RANKS:
        raise UserError(f"--gpus is {ranks}: layouts are planned for up to {MOST_RANKS:,}")
    config = copy.deepcopy(config)
    for key, value in recipe.losses.items():
        setattr(config, key, value)
    found = []
    for layout in candidates(config, ranks):
        try:
            found.append(need_of_rank(config, recipe, layout))
        except UserError:  # FSDP cuts only the first dimension unevenly; no LoRA under tensor parallelism
            continue
    return sorted(found, key=lambda each: each.seconds)


def recommended(needs: list[RankNeed], available: int) -> tuple[RankNeed, bool]:
    """The layout to take, and whether it fits: the quickest to send of those that do, else the smallest."""
    fitting = [each for each in needs if each.total <= available]
    if fitting:
        return min(fitting, key=lambda each: (each.seconds, each.total)), True
    return min(needs, key=lambda each: each.total), False


def need_of_rank(config: DeepseekMoeConfig, recipe: Recipe, layout: Layout) -> RankNeed:
    """What the fullest rank of a layout needs.

    Raises:
        UserError: the layout cannot be had, or the recipe's adapters do not go with it.
    """
    spreads = spreads_of(config, recipe, layout)
    plan = MemoryPlan(narrowed(config, layout.tp), recipe)
    shape = dataclasses.replace(plan.shape(), expert_ranks=layout.ep)
    fullest = max(range(layout.ranks), key=lambda rank: sum(_held(each, rank) for each in spreads))
    trained = [each.on(fullest) for each in spreads if each.whole.is_trained]
    weights = sum(each.bytes_on(fullest) for each in spreads)
    gradients = sum(each.nbytes for each in trained)
    states, scratch = optimizer_bytes(plan.training.get("optim") or "adamw_torch_fused", trained, plan.device)
    is_cut = any(each.is_gathered for each in spreads)
    # A layer's gradients are cut as soon as they are whole, so what is kept of them is there from the second batch on.
    kept = gradients if is_cut or plan.accumulates else 0
    moments = [(g, a + t) for _, g, a, t in training_peak(plan.groups(plan.base, shape), kept)]
    moments.append((gradients, scratch))
    at_peak, activations = max(moments, key=sum)
    whole = gathered(each.computed for each in spreads if each.is_gathered) if is_cut else 0
    if layout.is_ddp:
        whole = gradients  # its buckets
    moving = gradients + whole + activations
    traffic = traffic_of(spreads, layout, plan.config, shape, recipe.gradient_checkpointing)
    return RankNeed(
        layout,
        weights,
        at_peak if kept == 0 else gradients,
        states,
        whole,
        activations,
        CUDA_CONTEXT + int(FRAGMENTATION * moving),
        fullest,
        tuple(traffic),
    )


def narrowed(config: DeepseekMoeConfig, tp: int) -> DeepseekMoeConfig:
    """The config of what one rank of tensor parallelism computes: so much fewer heads, so much narrower experts."""
    config = copy.deepcopy(config)
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "moe_intermediate_size"):
        setattr(config, name, getattr(config, name) // tp)
    return config


def _held(spread: Spread, rank: int) -> int:
    return spread.bytes_on(rank) * (1 + spread.whole.is_trained)
