"""Latent decode attention, and causal attention with keys of 192 and values of 128 by each kernel of torch."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gpu_counts import LatentSize
from gpu_experts import GpuBench, achieved, compared
from gpu_rows import Row
from gpu_timing import alternate_on_device, captured
from measure import agreement, compare
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from modeling_deepseek_moe.kernels.triton.latent_decode import latent_attention, quantize_latent

_CACHE_BYTES = 2**28  # several times an L2 cache
_MOST_SETS = 64
BOUND = 0.03  # of the largest entry: bfloat16 keeps 8 bits
FP8_BOUND = 0.1  # a latent in e4m3 is off by up to a sixteenth
_KEYS, _VALUES = 192, 128


def latent_row(bench: GpuBench, row: Row) -> list[dict[str, Any]]:
    """One decode step's attention of one layer against two products and a softmax; both in a CUDA graph.

    A graph holds one call for each of so many caches that none is in the L2 cache when its turn comes.
    """
    size: LatentSize = row.facts["size"]
    rank, scaling = size.rank, (size.rank + size.rope) ** -0.5
    cache_bytes = size.batch * size.context * (rank + size.rope) * 2
    sets = max(1, min(_MOST_SETS, -(-_CACHE_BYTES // cache_bytes))) if bench.device.type == "cuda" else 1
    draw = partial(torch.randn, dtype=torch.bfloat16, device=bench.device)
    queries = [draw(size.batch, size.heads, 1, rank + size.rope) for _ in range(sets)]
    caches = [draw(size.batch, size.context, rank + size.rope) for _ in range(sets)]
    read = [quantize_latent(cache, rank) for cache in caches] if row.facts["is_fp8"] else caches
    calls = {
        "ours": [partial(latent_attention, q, cache, rank, scaling) for q, cache in zip(queries, read, strict=True)],
        "torch": [partial(_torch_latents, q, cache, rank, scaling) for q, cache in zip(queries, caches, strict=True)],
    }
    bound = FP8_BOUND if row.facts["is_fp8"] else BOUND
    agrees = agreement(row.work, calls["ours"][0](), calls["torch"][0](), bound)
    graphs = {name: captured(each, bench.device) for name, each in calls.items()}
    seconds = alternate_on_device(
        {name: lambda seed, graph=graph: graph for name, graph in graphs.items()}, bench.repeats, bench.device
    )
    ours, torchs = ([value / sets for value in seconds[name]] for name in ("ours", "torch"))
    (label,) = row.others
    found = compared(row, label, ("latent_attention", ours), (label, torchs), agreement=agrees)
    return [found | achieved(row, ours, bench.roofs)]


def _torch_latents(queries, cached, rank, scaling) -> torch.Tensor:
    rows = queries.flatten(1, 2)
    weights = ((rows @ cached.mT).float() * scaling).softmax(-1).to(cached.dtype)
    return (weights @ cached[..., :rank]).unflatten(1, queries.shape[1:3])


def attention_row(bench: GpuBench, row: Row) -> list[dict[str, Any]]:
    """Each kernel by name against the fastest of them; those that cannot run say why."""
    tokens, heads, documents = row.facts["tokens"], row.facts["heads"], row.facts["documents"]
    draw = partial(torch.randn, dtype=torch.bfloat16, device=bench.device)
    inputs = [
        [draw(1, heads, tokens, width).requires_grad_() for width in (_KEYS, _KEYS, _VALUES)]
        + [draw(1, heads, tokens, _VALUES)]
        for _ in range(3)
    ]
    sides, notes, expected = {}, [], None
    torch.compiler.reset()  # it compiles a function for so many shapes and no more
    for name, attend in _kernels(tokens, documents, bench.device).items():
        prepare = partial(_prepared, attend, inputs, row.facts["backward"])
        try:
            output = prepare(0)()
            expected = output if expected is None else expected
            agreement(f"{row.work}, {name}", output, expected, BOUND)
        except Exception as error:  # not installed, not for this device or these heads: others still compare
            notes.append(f"{name}: {(str(error) or type(error).__name__).splitlines()[0][:120]}")
            continue
        sides[name] = prepare
    seconds = alternate_on_device(sides, bench.repeats, bench.device)
    best = min(seconds, key=lambda name: statistics.median(seconds[name]))
    found = [
        compare(row.work, (best, seconds[best]), (name, values)) | achieved(row, seconds[best], bench.roofs)
        for name, values in seconds.items()
        if name != best or len(seconds) == 1
    ]
    return [*found, *({"work": row.work, "note": note} for note in notes)]


def _prepared(attend, inputs, backward: bool, seed: int) -> Callable[[], torch.Tensor]:
    *leaves, gradient = inputs[seed % len(inputs)]

    def step() -> torch.Tensor:
        if not backward:
            with torch.no_grad():
                return attend(*leaves)
        output = attend(*leaves)
        torch.autograd.grad(output, leaves, gradient)
        return output.detach()

    return step


def _kernels(tokens: int, documents: int, device: torch.device) -> dict[str, Callable]:
    """By name, the most general first, which the others are compared with."""
    packed = documents > 1
    document = torch.arange(tokens, device=device) // (tokens // documents)
    mask = None
    if packed:
        mask = (document[:, None] == document).tril()

    def visible(batch, head, query, key):
        return (query >= key) & (document[query] == document[key])

    def by(backend: SDPBackend | None):
        def attend(q, k, v):
            if backend is None:
                return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)

        return attend

    blocks = create_block_mask(visible, None, None, tokens, tokens, device=device)
    flex = torch.compile(flex_attention) if device.type == "cuda" else flex_attention
    return {
        "sdpa": by(None),
        "sdpa_cudnn": by(SDPBackend.CUDNN_ATTENTION),
        "sdpa, memory-efficient": by(SDPBackend.EFFICIENT_ATTENTION),
        "sdpa, flash, values padded to 192": _padded(by(SDPBackend.FLASH_ATTENTION)),
        "flex_attention": lambda q, k, v: flex(q, k, v, block_mask=blocks),
        "flash_attention_2": _flash("flash_attn", tokens, documents),
        "flash_attention_3": _flash("flash_attn_interface", tokens, documents),
        "flash_attention_4": _flash("flash_attn.cute", tokens, documents),
    }


def _padded(attend) -> Callable:
    def padded(q, k, v):
        return attend(q, k, torch.nn.functional.pad(v, (0, _KEYS - _VALUES)))[..., :_VALUES]

    return padded


def _flash(module: str, tokens: int, documents: int) -> Callable:
    """That package's attention of variable lengths; values padded where it wants them as wide as keys."""

    def attend(q, k, v):
        from importlib import import_module

        varlen = import_module(module).flash_attn_varlen_func
        ends = torch.arange(0, tokens + 1, tokens // documents, dtype=torch.int32, device=q.device)
        values = v if module != "flash_attn" else torch.nn.functional.pad(v, (0, _KEYS - _VALUES))
        rows = [tensor.squeeze(0).transpose(0, 1) for tensor in (q, k, values)]
        lengths = dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), tokens // documents)
        output = varlen(*rows, cu_seqlens_q=ends, cu_seqlens_k=ends, **lengths, causal=True)
        output = output[0] if isinstance(output, tuple) else output
        return output[..., :_VALUES].transpose(0, 1)[None]

    return attend
