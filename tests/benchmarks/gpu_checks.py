"""Every launcher of the Triton kernels against its plain PyTorch reference in float64, on the device.

Inputs are drawn afresh, outputs hold NaN before a kernel writes them, and what counts is the norm of the difference
over the norm of what is expected, of all rows together and of the worst one by itself. The routing has an expert that
serves nobody and pairs that nobody here serves.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from gpu_counts import V2_LITE, ExpertSize
from torch.func import functional_call

from modeling_deepseek_moe.experts import DeepseekMoeExperts
from modeling_deepseek_moe.kernels.sorted.low_rank import Adapter
from modeling_deepseek_moe.kernels.triton import reference
from modeling_deepseek_moe.kernels.triton.experts import triton_experts
from modeling_deepseek_moe.kernels.triton.gate_up import gate_backward, gate_up_product
from modeling_deepseek_moe.kernels.triton.grouped_gemm import rows_product
from modeling_deepseek_moe.kernels.triton.latent_decode import latent_attention, quantize_latent
from modeling_deepseek_moe.kernels.triton.pair_sorting import sort_pairs, sum_pairs
from modeling_deepseek_moe.kernels.triton.weight_gradient import weight_gradient

# A rounding to bfloat16 is off by 2^-8 at most, to float16 by 2^-11; results have been rounded up to four times.
BOUNDS = {torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
# e4m3 keeps 4 bits, so a value is off by a sixteenth at most.
FP8_BOUND = 0.0625
SCALING = 0.75

# The name of a result, what it is, what it should be.
Results = Iterator[tuple[str, torch.Tensor, torch.Tensor]]


class CheckSize(NamedTuple):
    """What to check at. Of latents: batch, heads, query tokens, cached tokens, rank, rope."""

    experts: ExpertSize
    tokens: int
    rank: int
    latents: tuple[tuple[int, int, int, int, int, int], ...]


# 37 and 517 cached tokens leave a ragged last tile; 128 heads by 3 query tokens are more rows than one tile has.
TINY = CheckSize(ExpertSize("tiny", 48, 32, 4, 2), 7, 4, ((2, 3, 1, 37, 32, 16), (1, 3, 2, 37, 48, 16)))
RAGGED = CheckSize(
    ExpertSize("ragged", 512, 352, 16, 6), 301, 16, ((2, 16, 1, 517, 512, 64), (3, 128, 3, 517, 512, 64))
)
V2_LITE_SIZE = CheckSize(V2_LITE, 1024, 16, ((1, 16, 1, 8192, 512, 64), (1, 128, 1, 8192, 512, 64)))
_WORKERS = 8


def run_checks(device: torch.device, seed: int) -> Iterator[list[dict[str, Any]]]:
    """The results of each check: its name, the error, the bound, whether that holds.

    On a GPU in processes side by side: most of the time goes into compiling, whose results all of them and the
    timing find in Triton's cache. A process that dies is a result, too.
    """
    numbers = range(len(_checks_of(device)))
    if device.type == "cpu":
        yield from (run_check(device.type, seed, number) for number in numbers)
        return
    workers = min(_WORKERS, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for future in [pool.submit(run_check, device.type, seed, number) for number in numbers]:
            try:
                yield future.result()
            except BrokenProcessPool as error:
                yield [_failed("a check", error)]
                return


def run_check(device: str, seed: int, number: int) -> list[dict[str, Any]]:
    """The results of one check. An exception is one, too."""
    name, dtype, check = _checks_of(torch.device(device))[number]
    label = f"{name}, {str(dtype).removeprefix('torch.')}"
    torch.manual_seed(seed + number)
    found = []
    try:
        with _poisoned():
            for what, actual, expected in check():
                bound = FP8_BOUND if what == "FP8 values" else BOUNDS[dtype]
                error = _distance(actual, expected)
                found.append({"check": f"{label}: {what}", "error": error, "bound": bound, "holds": error <= bound})
    except Exception as error:  # whatever the compiler or the device raises, the other checks still say something
        found.append(_failed(label, error))
    return found


def _failed(label: str, error: Exception) -> dict[str, Any]:
    message = f"{type(error).__name__}: {error}".splitlines()[0]
    return {"check": f"{label}: {message}", "error": None, "bound": None, "holds": False}


def _checks_of(device: torch.device) -> list[tuple[str, torch.dtype, Callable[[], Results]]]:
    """A name, a dtype, and what computes the results; tiny where kernels are interpreted."""
    composed = {"experts": _experts, "LoRA": _lora, "latents": _latents}
    every = {"products": _products, **composed}
    plans = [(TINY, tuple(BOUNDS), every)]
    if device.type != "cpu":
        plans = [(V2_LITE_SIZE, (torch.bfloat16,), composed), (RAGGED, tuple(BOUNDS), every)]
    return [
        (f"{name}, {size.experts.name}", dtype, partial(work, size, dtype, device))
        for size, dtypes, works in plans
        for dtype in dtypes
        for name, work in works.items()
    ]


def _products(size: CheckSize, dtype: torch.dtype, device: torch.device) -> Results:
    """Each launcher by itself."""
    (_, H, width, E, K), draw = size.experts, _drawer(dtype, device)
    x, index, w, W1, W2, dy = _inputs(size, dtype, device)
    rows = sort_pairs(index, E)
    expected_rows = reference.sort_pairs(index, E)
    yield "sort_pairs, pairs", rows.pairs.float(), expected_rows.pairs.float()
    yield "sort_pairs, ends", rows.ends.float(), expected_rows.ends.float()
    R, served, of_pairs = index.numel(), int(rows.ends[-1]), w.flatten()
    is_served = (index != E).flatten()
    t = draw(R, size.rank)
    wide, narrow = draw(E, size.rank, 2 * width), draw(E, size.rank, H)
    inner = draw(E, size.rank, width)

    for words, low in (("", None), (" with low rank", (t, wide))):
        got, want = _both(gate_up_product, x, W1, rows, K, low=low, save=True)
        for what, actual, expected in zip(("h", "gate_up"), got, want, strict=True):
            yield f"gate_up_product{words}, {what}", actual[:served], expected[:served]
    h, gate_up = got  # NaN in the rows that nobody here serves
    clean = gate_up.nan_to_num()
    options = {"transposed": True, "scatter": True, "row_weights": of_pairs, "low": (t, narrow)}
    got, want = _both(rows_product, h, W2, rows, **options)
    yield "rows_product, scattered", got[is_served], want[is_served]
    yield "sum_pairs", *_both(sum_pairs, got, index, E)
    got, want = _both(rows_product, x, draw(E, size.rank, H), rows, transposed=True, gather=K)
    yield "rows_product, gathered, as narrow as a rank", got[:served], want[:served]
    got, want = _both(rows_product, gate_up, W1, rows, transposed=False, scatter=True, low=(t, narrow))
    yield "rows_product, not transposed", got[is_served], want[is_served]
    for words, low in (("", None), (" with low rank", (t, inner))):
        got, want = _both(
            gate_backward,
            dy,
            W2,
            gate_up,
            of_pairs,
            rows,
            K,
            low=low,
            save_h=True,
            expected_from=(dy, W2, clean, of_pairs, rows, K),
        )
        yield f"gate_backward{words}, d gate_up", got[0][:served], want[0][:served]
        yield f"gate_backward{words}, h", got[1][:served], want[1][:served]
        yield f"gate_backward{words}, d weights", got[2], want[2]
    for what, left, right, options in (
        ("gathered right", gate_up, x, {"gather_right": K}),
        ("gathered left", dy, h, {"gather_left": K}),
        ("as narrow as a rank, weighted", t, dy, {"gather_right": K, "row_weights": of_pairs}),
    ):
        got = weight_gradient(left, right, rows, **options, dtype=dtype)
        want = reference.weight_gradient(*_doubled((left, right, rows)), **_doubled(options), dtype=torch.float64)
        yield f"weight_gradient, {what}", got, want
        yield f"weight_gradient, {what}, idle expert", 1 + got[E - 1], torch.ones_like(want[E - 1])


def _experts(size: CheckSize, dtype: torch.dtype, device: torch.device) -> Results:
    """Trained experts forward and backward, against autograd on the eager body."""
    x, index, w, W1, W2, dy = _inputs(size, dtype, device)
    leaves = {"hidden states": x, "weights": w, "gate_up_proj": W1, "down_proj": W2}

    def ours(x, w, W1, W2):
        return triton_experts(_module(size, W1, W2), x, index, w)

    def eager(x, w, W1, W2):
        return _eager(size, x, index, w, W1, W2)

    yield from _differentiated(leaves, ours, eager, dy)


def _lora(size: CheckSize, dtype: torch.dtype, device: torch.device) -> Results:
    """Adapters on frozen experts forward and backward, against autograd on W + B A."""
    (_, H, width, E, _), draw = size.experts, _drawer(dtype, device)
    x, index, w, W1, W2, dy = _inputs(size, dtype, device)
    shapes = {"A1": (E * size.rank, H), "B1": (2 * width, size.rank * E)}
    shapes |= {"A2": (E * size.rank, width), "B2": (H, size.rank * E)}
    leaves = {"hidden states": x, "weights": w}
    leaves |= {name: draw(*shape) / size.rank for name, shape in shapes.items()}

    def ours(x, w, A1, B1, A2, B2):
        gate_up, down = [Adapter(A1, B1, SCALING)], [Adapter(A2, B2, SCALING)]
        return triton_experts(_module(size, W1, W2), x, index, w, gate_up, down)

    def rebuilt(x, w, A1, B1, A2, B2):
        W = [
            weight.double() + SCALING * torch.einsum("ore,eri->eoi", B.unflatten(1, (-1, E)), A.unflatten(0, (E, -1)))
            for weight, A, B in ((W1, A1, B1), (W2, A2, B2))
        ]
        return _eager(size, x, index, w, *W)

    yield from _differentiated(leaves, ours, rebuilt, dy)


def _latents(size: CheckSize, dtype: torch.dtype, device: torch.device) -> Results:
    """bf16 or fp16 and FP8 latents, causal and by a mask that hides all keys from one query."""
    draw = _drawer(dtype, device)
    for batch, heads, queries, length, rank, rope in size.latents:
        q, cached = draw(batch, heads, queries, rank + rope), draw(batch, length, rank + rope)
        mask = torch.rand(batch, queries, length, device=device) < 0.8
        mask[:, :, : length // 3] = False
        mask[0, 0] = False
        scaling = (rank + rope) ** -0.5
        quantized = quantize_latent(cached, rank)
        scales = quantized.scales.double().repeat_interleave(128, -1)[..., :rank]
        values = torch.cat((quantized.values.double() * scales, quantized.rope.double()), -1)
        yield "FP8 values", values, cached.double()
        for where, visible in (("causal", None), ("masked", mask)):
            what = f"{heads} heads, {queries} of {length} tokens, {where}"
            for kind, ours, expected in (("", cached, cached.double()), ("FP8, ", quantized, values)):
                want = reference.latent_attention(q.double(), expected, rank, scaling, visible)
                yield kind + what, latent_attention(q, ours, rank, scaling, visible), want


def _inputs(size: CheckSize, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Hidden states, ids, routing weights, both stacked weights, the output's gradient."""
    (_, H, width, E, K), draw = size.experts, _drawer(dtype, device)
    index = torch.rand(size.tokens, E - 1, device=device).topk(K).indices  # the last expert is idle
    index[torch.rand(index.shape, device=device) < 0.1] = E
    weights = torch.rand(size.tokens, K, device=device) / K
    W1, W2 = draw(E, 2 * width, H) * H**-0.5, draw(E, H, width) * width**-0.5
    return draw(size.tokens, H), index, weights, W1, W2, draw(size.tokens, H)


def _drawer(dtype: torch.dtype, device: torch.device) -> Callable[..., torch.Tensor]:
    return lambda *shape: torch.randn(*shape, dtype=dtype, device=device)


def _both(launcher: Callable, *args, expected_from: tuple | None = None, **options) -> tuple[Any, Any]:
    """What a launcher gives, and its reference in float64."""
    want = getattr(reference, launcher.__name__)
    return launcher(*args, **options), want(*_doubled(expected_from or args), **_doubled(options))


def _doubled(value):
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _doubled(each) for key, each in value.items()}
    return tuple(map(_doubled, value)) if type(value) is tuple else value


def _differentiated(leaves: dict[str, torch.Tensor], ours: Callable, expected: Callable, dy: torch.Tensor) -> Results:
    """The output and the gradient of each leaf; the expected ones from float64 copies."""
    copies = [leaf.double().requires_grad_() for leaf in leaves.values()]
    originals = [leaf.clone().requires_grad_() for leaf in leaves.values()]
    got, want = ours(*originals), expected(*copies)
    yield "output", got.detach(), want.detach()
    gradients = torch.autograd.grad(got, originals, dy), torch.autograd.grad(want, copies, dy.double())
    for name, actual, of_copy in zip(leaves, *gradients, strict=True):
        yield f"gradient of {name}", actual, of_copy


def _module(size: CheckSize, W1: torch.Tensor, W2: torch.Tensor):
    """Experts of these weights, which keep their graph."""
    module = _empty_experts(size)
    for name, weight in (("gate_up_proj", W1), ("down_proj", W2)):
        del module._parameters[name]
        setattr(module, name, weight)
    return module


def _eager(size: CheckSize, x, index, w, W1, W2) -> torch.Tensor:
    return functional_call(_empty_experts(size), {"gate_up_proj": W1, "down_proj": W2}, (x, index, w))


def experts_of(size: ExpertSize, implementation: str) -> DeepseekMoeExperts:
    """One layer's routed experts, not initialised, on torch's default device and in its default dtype."""
    config = SimpleNamespace(
        n_routed_experts=size.E, hidden_size=size.H, moe_intermediate_size=size.I, hidden_act="silu"
    )
    config._experts_implementation = implementation
    return DeepseekMoeExperts(config)


def _empty_experts(size: CheckSize) -> DeepseekMoeExperts:
    with torch.device("meta"):
        return experts_of(size.experts, "eager")


def _distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference over that of `expected`, or an eighth of the worst row's over the mean row's.

    One wrong row of thousands shows in the second. NaN, which is below no bound, if anything is NaN.
    """
    if actual.shape != expected.shape:
        return float("nan")
    rows = (1, -1) if actual.dim() == 1 else (-1, actual.shape[-1])
    differences = (actual.double() - expected).reshape(rows).norm(dim=1)
    norms = expected.double().reshape(rows).norm(dim=1)
    total = norms.norm().clamp_min(1e-30)
    return torch.maximum(differences.norm() / total, differences.max() / (8 * total / len(norms) ** 0.5)).item()


@contextmanager
def _poisoned() -> Iterator[None]:
    """Memory that is allocated and not written holds NaN, and the largest number where it holds integers."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
