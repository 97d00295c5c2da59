"""Operations and bytes of every row of the GPU benchmark, counted, and the times they predict on a roofline.

N tokens, K chosen experts a token, R = N K pairs, E experts, H hidden size, I width of one expert, r a LoRA rank,
L cached tokens, c the latent's rank. A product of `[n, a]` and `[a, b]` is 2 n a b operations. Bytes are the fewest
that one launch can move: each input read once, each output written once, nothing kept from the launch before. A row's
time is the sum over its launches of the longer of both times; what starting a launch costs is not in it.

What the other sides do is counted the same way, from the sources of transformers 5.23 and PEFT 0.21.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

HALF, FLOAT = 2, 4  # bytes of a number


class Roofs(NamedTuple):
    """What a device does in a second."""

    flops: float  # dense bfloat16, accumulated in float32
    bytes: float  # device memory, read plus written


# NVIDIA's datasheet of the H100 SXM: nothing is faster.
DATASHEET = Roofs(990e12, 3.35e12)
# Assumed of large products and copies there, which run at less than the datasheet says; gpu.py measures both.
ASSUMED = Roofs(700e12, 3.0e12)


class Launch(NamedTuple):
    """One kernel, or several of one kind in a row."""

    name: str
    flops: float
    bytes: float
    padding: float = 1.0  # rows of all tiles over rows that are real

    def seconds(self, roofs: Roofs) -> float:
        """The longer of the times for operations, those on padding among them, and bytes."""
        return max(self.flops * self.padding / roofs.flops, self.bytes / roofs.bytes)

    def is_bound_by_bytes(self, roofs: Roofs) -> bool:
        return self.bytes / roofs.bytes > self.flops * self.padding / roofs.flops

    def times(self, count: float) -> Launch:
        """That often."""
        return self._replace(flops=count * self.flops, bytes=count * self.bytes)


class Work(NamedTuple):
    """The launches of one side of a row."""

    launches: tuple[Launch, ...]

    @property
    def flops(self) -> float:
        return sum(launch.flops for launch in self.launches)

    @property
    def bytes(self) -> float:
        return sum(launch.bytes for launch in self.launches)

    def seconds(self, roofs: Roofs) -> float:
        return sum(launch.seconds(roofs) for launch in self.launches)

    def bound(self, roofs: Roofs) -> str:
        """What most of the time goes to, and its share."""
        by_bytes = sum(launch.seconds(roofs) for launch in self.launches if launch.is_bound_by_bytes(roofs))
        share = by_bytes / self.seconds(roofs)
        return f"bytes, {share:.0%}" if share > 0.5 else f"operations, {1 - share:.0%}"

    def __add__(self, other: Work) -> Work:
        return Work(self.launches + other.launches)

    def times(self, count: float) -> Work:
        return Work(tuple(launch.times(count) for launch in self.launches))


class ExpertSize(NamedTuple):
    """Routed experts of one layer."""

    name: str
    H: int
    I: int  # noqa: E741
    E: int
    K: int

    @property
    def weight_bytes(self) -> int:
        """Of both stacked weights."""
        return 3 * self.E * self.H * self.I * HALF


V2_LITE = ExpertSize("V2-Lite", 2048, 1408, 64, 6)
V3 = ExpertSize("V3", 7168, 2048, 256, 8)


class LatentSize(NamedTuple):
    """One decode step of latent attention of one layer."""

    batch: int
    context: int
    heads: int
    rank: int = 512
    rope: int = 64


def expert_forward(size: ExpertSize, tokens: int, padding: float = 1.0, rank: int = 0, save: bool = False) -> Work:
    """This package's launches, with LoRA of `rank` and saving what a backward pass needs, if asked."""
    _, H, width, E, K = size
    R = tokens * K
    gate_up = _product("gate_up_product", tokens * H, R, H, 2 * width, E, padding, R * width)
    down = _product("rows_product, down", R * width, R, width, H, E, padding, R * H)
    if save:
        gate_up = gate_up._replace(bytes=gate_up.bytes + R * 2 * width * HALF)
    launches = [_sort(R), gate_up, down, _sum_pairs(size, tokens)]
    if rank:
        launches[1:3] = [
            _product("t = x A1'", tokens * H, R, H, rank, E, padding),
            _with_low(gate_up, size, R, 2 * width, rank),
            _product("u = h A2'", R * width, R, width, rank, E, padding),
            _with_low(down, size, R, H, rank),
        ]
    return Work(tuple(launches))


def expert_backward(size: ExpertSize, tokens: int, padding: float = 1.0, rank: int = 0, trained: bool = True) -> Work:
    """This package's launches; gradients of the weights if they are `trained`, of LoRA's factors if `rank`."""
    _, H, width, E, K = size
    R = tokens * K
    down = _product("gate_backward", tokens * H, R, H, width, E, padding, R * 2 * width, read=R * 2 * width)
    gate_up = _product("rows_product, dx", R * 2 * width, R, 2 * width, H, E, padding)
    if trained or rank:
        down = down._replace(bytes=down.bytes + R * width * HALF)  # h once more
    launches = [down, gate_up, _sum_pairs(size, tokens)]
    if trained:
        launches += [
            _gradient("weight_gradient, down", tokens * H, R * width, R, H, width, E),
            _gradient("weight_gradient, gate_up", R * 2 * width, tokens * H, R, 2 * width, H, E),
        ]
    if rank:
        launches[:2] = [
            _product("v = dy B2'", tokens * H, R, H, rank, E, padding),
            _with_low(down, size, R, width, rank),
            _product("v = d gate_up B1'", R * 2 * width, R, 2 * width, rank, E, padding),
            _with_low(gate_up, size, R, H, rank),
        ]
        for name, left, right, a, b in (
            ("dA2", R * rank, R * width, rank, width),
            ("dB2", R * rank, tokens * H, rank, H),
            ("dA1", R * rank, tokens * H, rank, H),
            ("dB1", R * rank, R * 2 * width, rank, 2 * width),
        ):
            launches.append(_gradient(f"weight_gradient, {name}", left, right, R, a, b, E))
    return Work(tuple(launches))


def grouped_mm_forward(size: ExpertSize, tokens: int, padding: float = 1.0, pefts_rank: int = 0) -> Work:
    """transformers' "grouped_mm"; with PEFT's adapters of that rank, W + B A of all experts built before."""
    _, H, width, E, K = size
    R = tokens * K
    rebuilt = ()
    if pefts_rank:
        rebuilt = (Launch("W + B A", size.weight_bytes * pefts_rank, 2 * size.weight_bytes),)
    return Work(
        (
            *rebuilt,
            _pass("rows of experts", tokens * H, R * H),
            _product("grouped_mm", R * H, R, H, 2 * width, E, padding),
            _pass("SiLU(gate) up", 3 * R * width, 2 * R * width),
            _product("grouped_mm", R * width, R, width, H, E, padding),
            # The routing weights are float32, and so are the results.
            Launch("weights", R * H, R * H * (HALF + FLOAT)),
            Launch("rows of tokens", 0, 2 * R * H * FLOAT),
            Launch("sum", R * H, R * H * FLOAT + tokens * H * (FLOAT + 2 * HALF)),
        )
    )


def grouped_mm_backward(
    size: ExpertSize, tokens: int, padding: float = 1.0, trained: bool = True, pefts_rank: int = 0
) -> Work:
    """transformers' "grouped_mm"; PEFT's adapters need the gradients of all weights first."""
    _, H, width, E, K = size
    R = tokens * K
    launches = [
        Launch("rows of experts", 0, tokens * H * FLOAT + R * H * FLOAT),
        Launch("weights", 3 * R * H, R * H * (FLOAT + HALF) + R * H * (2 * FLOAT + HALF)),
        _product("grouped_mm", R * H, R, H, width, E, padding),
        _pass("SwiGLU'", 7 * R * width, 4 * R * width),
        _product("grouped_mm", R * 2 * width, R, 2 * width, H, E, padding),
        _pass("rows of tokens", R * H, tokens * H),
    ]
    if trained or pefts_rank:
        launches += [
            _gradient("grouped_mm", R * H, R * width, R, H, width, E),
            _gradient("grouped_mm", R * 2 * width, R * H, R, 2 * width, H, E),
        ]
    if pefts_rank:
        launches.append(Launch("dA, dB", 2 * size.weight_bytes * pefts_rank, 2 * size.weight_bytes))
    return Work(tuple(launches))


def latent_attention(size: LatentSize, is_fp8: bool = False, splits: int = 1) -> Work:
    """This package's kernel on one query token, and the reduction over its splits."""
    B, L, heads, rank, rope = size
    cached = rank + FLOAT * -(-rank // 128) + rope * HALF if is_fp8 else (rank + rope) * HALF
    rows = B * heads
    ends = rows * (rank + rope + rank) * HALF
    partials = rows * splits * (rank + 1) * FLOAT if splits > 1 else 0
    attend = Launch("latent_attention", 2 * rows * L * (2 * rank + rope), B * L * cached + ends + partials)
    return Work((attend, Launch("reduction", rows * splits * rank, partials)) if partials else (attend,))


def torch_latent_attention(size: LatentSize) -> Work:
    """The same by two products and a softmax in float32 between them."""
    B, L, heads, rank, rope = size
    scores = B * heads * L
    return Work(
        (
            Launch("scores", 2 * scores * (rank + rope), B * L * (rank + rope) * HALF + scores * HALF),
            Launch("softmax", 5 * scores, scores * (HALF + FLOAT + 2 * FLOAT + 2 * FLOAT + FLOAT + HALF)),
            Launch("mix", 2 * scores * rank, B * L * rank * HALF + scores * HALF),
        )
    )


def causal_attention(tokens: int, heads: int, keys: int = 192, values: int = 128, backward: bool = False) -> Work:
    """One sequence, expanded: the products above the diagonal left out, those of a backward pass added."""
    pairs, rows = tokens * (tokens + 1) // 2 * heads, tokens * heads
    launches = [Launch("forward", 2 * pairs * (keys + values), rows * 2 * (keys + values) * HALF)]
    if backward:
        # Scores again, dV, dP, dQ, dK.
        launches.append(Launch("backward", 2 * pairs * (3 * keys + 2 * values), rows * 4 * (keys + values) * HALF))
    return Work(tuple(launches))


def tile_padding(rows_of_experts: Sequence[int], rows_of_a_tile: int) -> float:
    """Rows of all tiles over rows: an expert's last tile is computed whole."""
    filled = sum(-(-rows // rows_of_a_tile) * rows_of_a_tile for rows in rows_of_experts)
    return filled / sum(rows_of_experts)


def _product(name, reads, R, inner, outer, E, padding, writes=None, read=0) -> Launch:
    """Rows `[R, inner]` times each expert's `[inner, outer]`; `reads`, `read` and `writes` are numbers."""
    numbers = reads + read + E * inner * outer + (R * outer if writes is None else writes)
    return Launch(name, 2 * R * inner * outer, numbers * HALF, padding)


def _with_low(launch: Launch, size: ExpertSize, R: int, outer: int, rank: int) -> Launch:
    more = (R * rank + size.E * rank * outer) * HALF
    return launch._replace(flops=launch.flops + 2 * R * rank * outer, bytes=launch.bytes + more)


def _gradient(name, left, right, R, a, b, E) -> Launch:
    return Launch(name, 2 * R * a * b, (left + right + E * a * b) * HALF)


def _pass(name, reads, writes) -> Launch:
    return Launch(name, writes, (reads + writes) * HALF)


def _sort(R: int) -> Launch:
    return Launch("sort_pairs", 0, R * (8 + 4))


def _sum_pairs(size: ExpertSize, tokens: int) -> Launch:
    numbers = tokens * size.K * size.H
    return Launch("sum_pairs", numbers, (numbers + tokens * size.H) * HALF)
