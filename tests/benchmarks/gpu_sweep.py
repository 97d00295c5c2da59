"""Tile configurations of each launcher, handed to it by argument, timed one by one on a CUDA device."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from gpu_counts import ExpertSize, LatentSize, Work, expert_backward, expert_forward, latent_attention
from gpu_experts import GpuBench
from gpu_rows import Sizes
from gpu_timing import Budget, alternate_on_device

from modeling_deepseek_moe.kernels.triton import latent_decode
from modeling_deepseek_moe.kernels.triton.gate_up import gate_backward, gate_up_product
from modeling_deepseek_moe.kernels.triton.grouped_gemm import Tiles, fitting, rows_product
from modeling_deepseek_moe.kernels.triton.launch import shared_memory
from modeling_deepseek_moe.kernels.triton.pair_sorting import sort_pairs
from modeling_deepseek_moe.kernels.triton.weight_gradient import weight_gradient

# Rows, columns, depth, warps, stages; as many stages are taken as have room.
PRODUCT_TILES = tuple(
    Tiles(*numbers)
    for numbers in (
        (128, 256, 64, 8, 4),
        (128, 256, 64, 8, 3),
        (128, 128, 64, 8, 4),
        (128, 128, 64, 4, 4),
        (128, 128, 128, 8, 3),
        (256, 128, 64, 8, 4),
        (64, 256, 64, 8, 4),
        (64, 256, 64, 4, 4),
        (64, 128, 64, 4, 4),
    )
)
# Rows, cached tokens, warps, stages, programs on a multiprocessor.
LATENT_TILES = tuple(
    latent_decode.Tiles(*numbers)
    for numbers in ((16, 32, 4, 3, 2), (16, 32, 4, 2, 2), (16, 64, 4, 2, 1), (64, 32, 8, 3, 1), (64, 64, 8, 2, 1))
)
_HALF = 2


class Launcher(NamedTuple):
    """One launcher at one size, and which launch of the counted ones it is."""

    work: str
    call: Callable[..., Any]  # takes the tiles, None for the launcher's own choice
    counted: Work
    tiles: Sequence[tuple]


def sweep(bench: GpuBench, sizes: Sizes, budget: Budget) -> Iterator[dict[str, Any]]:
    """One fact sheet for each launcher and configuration; `tiles` is None for what the launcher chooses itself."""
    for launcher in _launchers(bench, sizes):
        for tiles in (None, *launcher.tiles):
            if budget.is_over:
                return
            found = {"work": launcher.work, "tiles": tiles and list(tiles)}
            call = partial(launcher.call, tiles)
            try:
                call()
                seconds = alternate_on_device({"": lambda seed, call=call: call}, bench.repeats, bench.device)
            except Exception as error:  # too many registers, too much shared memory: the other tiles are still of use
                yield found | {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
                continue
            median = statistics.median(seconds[""])
            rates = {"flops_per_second": launcher.counted.flops / median}
            yield found | {"seconds": median, **rates, "bytes_per_second": launcher.counted.bytes / median}


def _launchers(bench: GpuBench, sizes: Sizes) -> Iterator[Launcher]:
    for heads, context, batch, is_fp8 in product(sizes.heads, sizes.contexts[:1], sizes.batches[:1], (False, True)):
        yield _latents(bench, LatentSize(batch, context, heads, sizes.rank), is_fp8)
    for size, tokens in product(sizes.experts, sizes.tokens):
        yield from _experts(bench, size, tokens)


def _latents(bench: GpuBench, size: LatentSize, is_fp8: bool) -> Launcher:
    draw = partial(torch.randn, dtype=torch.bfloat16, device=bench.device)
    width = size.rank + size.rope
    queries, cached = draw(size.batch, size.heads, 1, width), draw(size.batch, size.context, width)
    cached = latent_decode.quantize_latent(cached, size.rank) if is_fp8 else cached

    def call(tiles):
        return latent_decode.latent_attention(queries, cached, size.rank, width**-0.5, tiles=tiles)

    kind = "FP8" if is_fp8 else "bf16"
    work = f"latent_attention, {kind}, {size.heads} heads, batch {size.batch}, {size.context} tokens"
    return Launcher(work, call, latent_attention(size, is_fp8), LATENT_TILES)


def _experts(bench: GpuBench, size: ExpertSize, tokens: int) -> Iterator[Launcher]:
    _, H, width, E, K = size
    draw = partial(torch.randn, dtype=torch.bfloat16, device=bench.device)
    module, room = bench.block(size), shared_memory(bench.device)
    W1, W2 = module.gate_up_proj.detach(), module.down_proj.detach()
    rows = sort_pairs(bench.routing(size).draw(tokens, seed=0).to(bench.device), E)
    R = tokens * K
    x, h, gate_up, weights = draw(tokens, H), draw(R, width), draw(R, 2 * width), draw(R).abs().float()
    calls = {
        "gate_up_product": lambda tiles: gate_up_product(x, W1, rows, K, save=True, config=tiles),
        "rows_product, down": lambda tiles: rows_product(
            h, W2, rows, transposed=True, scatter=True, row_weights=weights, config=tiles
        ),
        "gate_backward": lambda tiles: gate_backward(x, W2, gate_up, weights, rows, K, save_h=True, config=tiles),
        "rows_product, dx": lambda tiles: rows_product(
            gate_up, W1, rows, transposed=False, scatter=True, config=tiles
        ),
        "weight_gradient, gate_up": lambda tiles: weight_gradient(
            gate_up, x, rows, gather_right=K, dtype=torch.bfloat16, config=tiles
        ),
    }
    counted = expert_forward(size, tokens, save=True) + expert_backward(size, tokens)
    tiles = [fitting(each, _HALF, room) for each in PRODUCT_TILES]
    for name, call in calls.items():
        launches = tuple(launch for launch in counted.launches if launch.name == name)
        yield Launcher(f"{name}, {size.name}, {tokens} tokens", call, Work(launches), tiles)
