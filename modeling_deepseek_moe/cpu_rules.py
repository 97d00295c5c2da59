"""What matrix products on CPU go by: what this machine multiplies, asked once, and rules that were measured.

A rule holds on the machines that `holds` names, because of `reason`; `measured` says where that was seen. What a rule
does stands where it is used: `half_products.py`, `linear.py`, `absorption.py`, `kernels/sorted/`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

HALF = (torch.bfloat16, torch.float16)


class Machine(NamedTuple):
    """What a CPU can do, after what the environment takes away (`ATEN_CPU_CAPABILITY`, `ONEDNN_MAX_CPU_ISA`).

    Attributes:
        capability: torch's name of the vector instructions, such as "AVX2".
        half: the half-precision dtypes that oneDNN multiplies; torch multiplies the others in loops of its own.
        has_tiles: whether it has AMX.
        has_dots: whether it has AVX512-BF16.
    """

    capability: str
    half: tuple[torch.dtype, ...]
    has_tiles: bool
    has_dots: bool


class Rule(NamedTuple):
    """What to do, why, where that was measured, and on which machines it holds for numbers of a dtype."""

    what: str
    reason: str
    measured: str
    holds: Callable[[Machine, torch.dtype], bool]


@functools.cache
def machine() -> Machine:
    """This machine."""
    half: tuple[torch.dtype, ...] = ()
    if torch.backends.mkldnn.is_available():
        asked = (torch.ops.mkldnn._is_mkldnn_bf16_supported, torch.ops.mkldnn._is_mkldnn_fp16_supported)
        half = tuple(dtype for dtype, is_supported in zip(HALF, asked, strict=True) if is_supported())
    has_bfloat16 = torch.bfloat16 in half
    return Machine(
        torch.backends.cpu.get_cpu_capability(),
        half,
        has_bfloat16 and torch.cpu._is_amx_tile_supported(),
        has_bfloat16 and torch.cpu._is_avx512_bf16_supported(),
    )


def holds(rule: Rule, dtype: torch.dtype) -> bool:
    """Whether `rule` holds for products of `dtype` on this machine."""
    return rule.holds(machine(), dtype)


def _by_onednn(machine: Machine, dtype: torch.dtype) -> bool:
    return dtype in machine.half


THROUGH_FLOAT32 = Rule(
    "products of half precision are taken in float32, a tile of the larger operand at a time",
    "without oneDNN torch multiplies half precision in loops, up to 150 times slower than float32",
    "AMD EPYC (AVX2), 2 threads, torch 2.13, bfloat16, [96, 2816] x [2816, 2048]: 5,300 ms, in tiles 34 ms; the other "
    "layouts 155 to 2,600 ms, in tiles 30 ms. Backward of scaled_dot_product_attention: 7 times",
    lambda machine, dtype: dtype in HALF and dtype not in machine.half,
)
A_ROW_AS_IT_IS = Rule(
    "but a few rows times a weight `[out, in]` transposed are left to torch",
    "its loop of dot products reads half the bytes, which is all that so few rows cost",
    "AMD EPYC (AVX2), 2 threads, torch 2.13, 2816 x 2048: one row 0.6 ms, in tiles 2.2; four rows 4.5 and 4.7",
    THROUGH_FLOAT32.holds,
)
FEW_SIZES = Rule(
    "sizes of products are filled up to a few: the rows of an expert, blocks of 32 tokens of a cache",
    "oneDNN prepares itself anew for every size and stride that it has not seen, for as long as many products take",
    "Xeon (AMX), oneDNN 3: 1 to 13 ms a size; over a cache of 8k tokens three times the products of a layer",
    _by_onednn,
)
TWO_ROWS_FOR_ONE = Rule(
    "an expert's one row is multiplied as two",
    "oneDNN takes longer for one row than for two",
    "Xeon (AMX), oneDNN 3. Not so without oneDNN: AMD EPYC (AVX2), 21888 x 2048, one row 32 GB/s, two 18",
    _by_onednn,
)
WEIGHT_FIRST = Rule(
    "a few rows times a plain bfloat16 layer are multiplied as `(W x')'`",
    "oneDNN packs `W'` before it multiplies a few rows, up to twice the time of reading it; `W x'` packs `x'`",
    "Xeon (AMX), oneDNN 3, one to sixteen rows. Not with AVX512-BF16 alone: AMD EPYC, a row times V2-Lite's head "
    "takes 36 to 80 ms, the other way around 86 to 175 ms",
    lambda machine, dtype: (
        dtype == torch.bfloat16 and dtype in machine.half and (machine.has_tiles or not machine.has_dots)
    ),
)
RULES = (THROUGH_FLOAT32, A_ROW_AS_IT_IS, FEW_SIZES, TWO_ROWS_FOR_ONE, WEIGHT_FIRST)
