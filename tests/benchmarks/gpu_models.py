"""Whole steps of DeepSeek-V2-Lite with random weights on a CUDA device: decoding in a graph, and LoRA training."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from decode import filled_cache
from gpu_experts import GpuBench, achieved, compared
from gpu_rows import RANK, Row
from gpu_timing import alternate_on_device, captured, peak_memory
from measure import DisagreementError, agreement, compare, quartiles
from peft import LoraConfig, get_peft_model
from transformers import masking_utils
from transformers.cache_utils import Cache, DynamicLayer
from workbench import Settings, Side, Workbench

from modeling_deepseek_moe.attention_backends import best_attention
from modeling_deepseek_moe.expert_lora import register_expert_lora
from modeling_deepseek_moe.transformers_names import CACHE_NAME

_MODULES = r".*\.(self_attn\.\w+_proj(_with_mqa)?|mlp\.shared_experts\.(gate|up|down)_proj)"
_PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# Roundings of 27 layers add up, in small random ones on CPU to 0.02 of the largest logit and 0.1 of the norm of all
# gradients, to which PEFT's roundings of W + B A belong; what is wrong in a layer is as large as the layer's norm.
DECODE_BOUND = 0.06
GRADIENT_BOUND = 0.4

Tensors = dict[str, torch.Tensor]


@torch.inference_mode()
def decode_row(bench: GpuBench, row: Row) -> list[dict[str, Any]]:
    """A step of each side with its best settings in a CUDA graph; without one where it cannot be captured."""
    context = row.facts["context"]
    ours, theirs = _sides(bench, row)
    ours.model.set_experts_implementation("triton")
    ours.model.set_attn_implementation("mla_triton")
    steps = {"ours": _decoding(bench, ours, context)}
    for name in ("grouped_mm", "batched_mm"):
        steps[name] = _decoding(bench, theirs, context, name)
    agrees = [
        agreement(f"{row.work}, {name}", steps["ours"](), step(), DECODE_BOUND)
        for name, step in steps.items()
        if name != "ours"
    ]
    labels, graphs = {}, {}
    for name, step in steps.items():
        labels[name] = "CUDA graph" if bench.device.type == "cuda" else "no graph"
        try:
            # Some releases of transformers build a mask of ones while a graph is captured, and at no other time.
            with patch.object(masking_utils, "is_tracing", lambda *_: False):
                graphs[name] = captured([step], bench.device)
        except RuntimeError as error:
            if name == "ours":
                raise
            labels[name] = f"no graph: {str(error).splitlines()[0][:80]}"
            graphs[name] = step
    seconds = alternate_on_device(
        {name: lambda seed, graph=graph: graph for name, graph in graphs.items()}, bench.repeats, bench.device
    )
    ours_label = f"triton, mla_triton, {labels['ours']}"
    fastest = min(("grouped_mm", "batched_mm"), key=lambda name: quartiles(seconds[name])[0])
    (other,) = row.others
    found = compared(
        row,
        other,
        (ours_label, seconds["ours"]),
        (f"transformers, sdpa, {fastest}, {labels[fastest]}", seconds[fastest]),
        agreement=max(agrees, key=lambda each: each["difference"]),
    )
    return [found | achieved(row, seconds["ours"], bench.roofs)]


def _decoding(bench: GpuBench, side: Side, context: int, experts: str | None = None) -> Callable[[], torch.Tensor]:
    cache: Cache = filled_cache(side, context)
    for layer in cache.layers:
        _keep_full(layer, bench.device)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(side.model.config.vocab_size, (1, 1), generator=generator).to(bench.device)
    positions = torch.tensor([[context - 1]], device=bench.device)

    def step() -> torch.Tensor:
        if experts is not None:
            side.model.set_experts_implementation(experts)
        inputs = {"input_ids": ids, "position_ids": positions, CACHE_NAME: cache, "use_cache": True}
        return side.model(**inputs).logits

    side.route(1, seed=0)
    return step


def _keep_full(layer: DynamicLayer, device: torch.device) -> None:
    """Gives a cache's layer room for one token, which each step writes over: steps repeat at one and the same length.

    The layer stays of its class, by which latent attention knows what to put where.
    """
    layer.keys, layer.values = layer.keys.to(device).contiguous(), layer.values.to(device).contiguous()

    def update(key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        layer.keys[..., -1:, :] = key_states
        layer.values[..., -1:, :] = value_states
        return layer.keys, layer.values

    layer.update = update
    layer.get_seq_length = lambda *args: layer.keys.shape[-2] - 1


def step_row(bench: GpuBench, row: Row) -> list[dict[str, Any]]:
    """Forward and backward with gradient checkpointing and AdamW on the adapters: times, tokens a second, memory."""
    tokens = row.facts["tokens"]
    sides = dict(zip(("ours", "theirs"), _sides(bench, row), strict=True))
    ids = torch.randint(sides["ours"].model.config.vocab_size, (3, tokens), device=bench.device)
    trained = {name: _adapted(side, bench.device, is_ours=name == "ours") for name, side in sides.items()}
    steps = {name: _training(sides[name], *trained[name], ids) for name in sides}
    losses, gradients = {}, {}
    for name, (model, optimizer) in trained.items():
        sides[name].route(tokens, seed=0)
        loss = model(input_ids=ids[:1], labels=ids[:1], use_cache=False).loss
        loss.backward()
        losses[name] = loss.detach()
        gradients[name] = {key: p.grad for key, p in model.named_parameters() if p.requires_grad}
        optimizer.zero_grad()
    agreement(f"{row.work}: loss", losses["ours"], losses["theirs"], 0.01)
    agrees = _agreement_by_layer(f"{row.work}: gradients", gradients["ours"], gradients["theirs"], GRADIENT_BOUND)
    gradients.clear()
    peaks = {name: peak_memory(prepare(0), bench.device) for name, prepare in steps.items()}
    seconds = alternate_on_device(steps, bench.repeats, bench.device)
    (other,) = row.others
    rates = {name: tokens / quartiles(values)[0] for name, values in seconds.items()}
    our_label = f"triton, {sides['ours'].model.config._attn_implementation}"
    ours, theirs = (our_label, seconds["ours"]), (f"{other}, grouped_mm", seconds["theirs"])
    found = compared(row, other, ours, theirs, agreement=agrees, tokens_per_second=rates)
    memory = (our_label, [peaks["ours"]]), (f"{other}, grouped_mm", [peaks["theirs"]])
    below = compare(f"{row.work}: peak memory above weights", *memory, unit="bytes")
    return [found | achieved(row, seconds["ours"], bench.roofs), below]


def _agreement_by_layer(what: str, ours: Tensors, other: Tensors, bound: float) -> dict[str, float]:
    """The norm of all differences over that of all entries of `other`, of the layer where it is largest.

    Through many layers roundings grow until single entries that few tokens reach differ by a quarter of the largest;
    a layer that is wrong differs by its norm or more.
    """
    sums: dict[str, list[float]] = {}
    for key, tensor in other.items():
        of_layer = sums.setdefault(key.partition(".layers.")[2].partition(".")[0], [0.0, 0.0])
        of_layer[0] += ours[key].double().sub(tensor).square().sum().item()
        of_layer[1] += tensor.double().square().sum().item()
    shares = {layer: (squares / max(norm, 1e-60)) ** 0.5 for layer, (squares, norm) in sums.items()}
    worst = max(shares, key=lambda layer: math.inf if math.isnan(shares[layer]) else shares[layer])
    if not shares[worst] <= bound:
        raise DisagreementError(f"{what} of layer {worst} differ by {shares[worst]:.2g} of their norm")
    return {"difference": shares[worst], "bound": bound}


def _sides(bench: GpuBench, row: Row) -> tuple[Side, Side]:
    """This package's model and transformers' on one set of tensors, made on the device."""
    bench.release()
    gc.collect()
    layers = row.facts["model"]["num_hidden_layers"]
    built = Workbench(Settings("v2-lite", layers, torch.get_num_threads(), bench.repeats, (), None))
    built.fields |= row.facts["model"]
    built.routing = bench.routing(row.facts["size"])
    with torch.inference_mode(False), torch.device(bench.device):
        ours = built.build_ours(torch.bfloat16)
        theirs = built.theirs_on(ours.model)
    for side in (ours, theirs):
        side.model.to(bench.device).eval().requires_grad_(False)
        _choose_on(side, bench.device)
    return ours, theirs


def _choose_on(side: Side, device: torch.device) -> None:
    """Routing is drawn on the host; its choices are kept on the device."""
    route = side.route

    def routed(tokens: int, seed: int) -> None:
        route(tokens, seed)
        side._choices = {router: choice.to(device) for router, choice in side._choices.items()}

    side.route = routed


def _adapted(side: Side, device: torch.device, is_ours: bool):
    """The adapted model in training mode with gradient checkpointing, and its optimizer."""
    config = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules=_MODULES, target_parameters=_PARAMETERS, task_type="CAUSAL_LM"
    )
    # PEFT rewrites targets of type `deepseek_v2`: shared experts would become routed ones.
    model_type, side.model.config.model_type = side.model.config.model_type, "custom"
    model = get_peft_model(side.model, register_expert_lora(config, side.model) if is_ours else config)
    side.model.config.model_type = model_type
    if is_ours:
        side.model.set_experts_implementation("triton")
        side.model.set_attn_implementation(best_attention(side.model.config, device))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    trained = dict(sorted((name, p) for name, p in model.named_parameters() if p.requires_grad))
    for index, parameter in enumerate(trained.values()):
        generator = torch.Generator(parameter.device).manual_seed(index)
        with torch.no_grad():
            parameter.normal_(std=0.01, generator=generator)
    return model, torch.optim.AdamW(trained.values(), lr=1e-5, fused=True)


def _training(side: Side, model, optimizer, ids: torch.Tensor):
    def prepare(seed: int) -> Callable[[], torch.Tensor]:
        side.route(ids.shape[1], seed % len(ids))
        row = ids[seed % len(ids)][None]

        def step() -> torch.Tensor:
            loss = model(input_ids=row, labels=row, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        return step

    return prepare
