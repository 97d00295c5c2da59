"""LoRA of rank 16 on attention, routed and shared experts: the expert block, a whole step, and the step's memory.

All models share their frozen weights. PEFT's side is transformers' model with PEFT's own layers on the same modules.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from experts import outputs_of, routed_inputs
from measure import Case, DisagreementError, agreement, alternate, compare
from peft import LoraConfig, PeftModel, get_peft_model
from workbench import Side, Workbench

from modeling_deepseek_moe.finetune.model.lora import known_warnings, lora_config

TOKENS, RANK = 1024, 16
ALL_EXPERTS = ("attention", "shared_experts", "routed_experts")
BLOCK_GOAL, FROZEN_GOAL = 5.0, 1.3
STEP_GOAL, EAGER_GOAL = 3.0, 30.0
MEMORY_GOAL = 1.1
# Of the largest entry: PEFT rounds W + B A to bfloat16, which is coarser than adding the low-rank path to the output.
BOUND = 0.03
GRADIENT_BOUND = 0.05  # the same rounding goes through the backward pass, too


class Adapted:
    """A side with adapters; `step` is forward, backward and AdamW on the adapters."""

    def __init__(self, side: Side, config: LoraConfig):
        self.side = side
        with known_warnings(), _targets_as_named(side.model):
            self.model: PeftModel = get_peft_model(side.model, config)
        self.model.train()
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=1e-5, fused=True)

    @property
    def experts(self) -> torch.nn.Module:
        """The routed experts of the first DeepSeekMoE block, wrapped if they are adapted."""
        return self.side.moe.experts

    def randomize(self) -> None:
        """Adapters that do something, the same for the same names: PEFT starts one factor at zero."""
        for index, name in enumerate(sorted(self.parameters)):
            generator = torch.Generator().manual_seed(index)
            with torch.no_grad():
                self.parameters[name].normal_(std=0.01, generator=generator)

    def prepare(self, bench: Workbench, seed: int) -> torch.Tensor:
        """Token ids `[1, T]` of a step whose routing is set."""
        tokens = bench.tokens(TOKENS)
        self.side.route(tokens, seed)
        return bench.ids(tokens, seed)

    def prepare_step(self, bench: Workbench, seed: int) -> Callable[[], torch.Tensor]:
        ids = self.prepare(bench, seed)
        return lambda: self.step(ids)

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """The loss, after its gradients have moved the adapters and are gone."""
        loss = self.loss(ids)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def loss(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, labels=ids, use_cache=False).loss


def our_config(model, targets: tuple[str, ...]) -> LoraConfig:
    """Targets by words on a model of this package, with its layer on routed experts."""
    return lora_config(model, targets, r=RANK, lora_alpha=2 * RANK)


def pefts_config(config: LoraConfig) -> LoraConfig:
    """The same targets with PEFT's own layers."""
    return LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        target_modules=config.target_modules,
        target_parameters=config.target_parameters,
        task_type="CAUSAL_LM",
    )


@contextmanager
def _targets_as_named(model) -> Iterator[None]:
    """PEFT rewrites targets of types that it knows: shared experts would become routed ones (peft issue 3711)."""
    model_type = model.config.model_type
    if model_type != "deepseek_moe":
        model.config.model_type = "custom"
    try:
        yield
    finally:
        model.config.model_type = model_type


class Models:
    """The adapted models, built when first needed."""

    def __init__(self, bench: Workbench):
        self.bench = bench

    @functools.cached_property
    def ours(self) -> Adapted:
        adapted = Adapted(self.bench.ours_on(self._base), our_config(self._base, ALL_EXPERTS))
        adapted.randomize()
        return adapted

    @functools.cached_property
    def theirs(self) -> Adapted:
        config = pefts_config(our_config(self._base, ALL_EXPERTS))
        adapted = Adapted(self.bench.theirs_on(self._base), config)
        adapted.randomize()
        ours, theirs = ({name: p.shape for name, p in each.parameters.items()} for each in (self.ours, adapted))
        if ours != theirs:
            name = sorted(set(ours.items()) ^ set(theirs.items()))[0][0]
            raise DisagreementError(f"only one side has an adapter {name} of its shape: they do not train the same")
        return adapted

    @functools.cached_property
    def attention_only(self) -> Adapted:
        return Adapted(self.bench.ours_on(self._base), our_config(self._base, ("attention",)))

    @property
    def _base(self) -> torch.nn.Module:
        ours, _ = self.bench.pair()
        return ours.model


def cases(bench: Workbench) -> list[Case]:
    from lora_memory import memory_rows

    models = Models(bench)
    return [
        Case("expert block", lambda: block_rows(bench, models)),
        Case("whole step", lambda: step_rows(bench, models)),
        Case("peak memory of a step", lambda: memory_rows(bench)),
    ]


def block_rows(bench: Workbench, models: Models) -> list[dict[str, Any]]:
    """Forward and backward of the routed experts with adapters, against PEFT's layer and against no adapters."""
    sides = {
        "ours": _block(bench, models.ours),
        "theirs": _block(bench, models.theirs),
        "frozen": _block(bench, models.attention_only),
    }
    actual, expected = (sides[name](0)() for name in ("ours", "theirs"))
    label = f"experts with LoRA r={RANK}, {bench.tokens(TOKENS)} tokens, forward + backward"
    found = [
        agreement(f"{label}: {name}", actual[name], tensor, BOUND if name == "output" else GRADIENT_BOUND)
        for name, tensor in expected.items()
    ]
    agrees = max(found, key=lambda each: each["difference"] / each["bound"])
    seconds = alternate(sides, bench.settings.repeats)
    ours = (models.ours.side.experts, seconds["ours"])
    return [
        compare(
            label,
            ours,
            (f"PEFT, {models.theirs.side.experts}", seconds["theirs"]),
            at_least=BLOCK_GOAL,
            agreement=agrees,
        ),
        compare(label, ours, ("frozen experts without LoRA", seconds["frozen"]), at_most=FROZEN_GOAL),
    ]


def _block(bench: Workbench, adapted: Adapted):
    module, base = adapted.experts, bench.pair()[0].moe.experts

    def prepare(seed: int) -> Callable[[], dict[str, torch.Tensor]]:
        module.zero_grad()
        inputs = routed_inputs(bench, base, bench.tokens(TOKENS), seed)
        return lambda: outputs_of(module, *inputs, backward=True)

    return prepare


def step_rows(bench: Workbench, models: Models) -> list[dict[str, Any]]:
    """Whole steps against PEFT with both of transformers' implementations, and against attention-only LoRA."""
    agrees = check_step(bench, models)
    theirs = models.theirs.side.model

    def prepare_theirs(name: str):
        def prepare(seed: int) -> Callable[[], torch.Tensor]:
            theirs.set_experts_implementation(name)
            return models.theirs.prepare_step(bench, seed)

        return prepare

    sides = {
        "ours": lambda seed: models.ours.prepare_step(bench, seed),
        "attention": lambda seed: models.attention_only.prepare_step(bench, seed),
        "grouped_mm": prepare_theirs("grouped_mm"),
        "eager": prepare_theirs("eager"),
    }
    seconds = alternate(sides, bench.settings.repeats)
    theirs.set_experts_implementation("grouped_mm")
    label = f"LoRA step on attention, routed and shared experts, {bench.tokens(TOKENS)} tokens"
    ours = (models.ours.side.experts, seconds["ours"])
    parameters = sum(parameter.numel() for parameter in models.ours.parameters.values())
    found = [
        compare(
            label,
            ours,
            (f"transformers + PEFT, {name}", seconds[name]),
            at_least=goal,
            agreement=agrees,
            trained_parameters=parameters,
        )
        for name, goal in (("grouped_mm", STEP_GOAL), ("eager", EAGER_GOAL))
    ]
    attention = ("ours, LoRA on attention only", seconds["attention"])
    return [*found, compare(label, ours, attention, as_multiple=True)]


def check_step(bench: Workbench, models: Models) -> dict[str, float]:
    """Loss and every adapter's gradient of both sides agree; returns the worst of the gradients."""
    gradients = []
    losses = []
    for adapted in (models.ours, models.theirs):
        adapted.model.zero_grad()
        loss = adapted.loss(adapted.prepare(bench, seed=0))
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: p.grad for name, p in adapted.parameters.items() if p.grad is not None})
        adapted.model.zero_grad()
    agreement("loss of a LoRA step", *losses, 0.01)
    actual, expected = gradients
    if actual.keys() != expected.keys():
        raise DisagreementError(f"only one side trains {sorted(actual.keys() ^ expected.keys())[0]}")
    found = [agreement(f"gradient of {name}", actual[name], expected[name], GRADIENT_BOUND) for name in expected]
    return max(found, key=lambda each: each["difference"])
