"""What the launchers of `kernels/` launch at the sizes of real models, compiled for GPUs that need not be there.

Run as a program, in a process where kernels are not interpreted: `triton_cases.py ID...` prints what the compiler made
of each case as one JSON object.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from modeling_deepseek_moe.kernels.triton import gate_up, grouped_gemm, latent_decode, pair_sorting, weight_gradient
from modeling_deepseek_moe.kernels.triton.pair_sorting import SortedPairs, sort_pairs, sum_pairs

MODULES = [gate_up, grouped_gemm, latent_decode, pair_sorting, weight_gradient]
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes that one program may take, by compute capability
_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.bool: "*i1",
    torch.float8_e4m3fn: "*fp8e4nv",
}


class CompileCase(NamedTuple):
    """A call of a launcher on tensors without memory.

    Args:
        id: says what is launched.
        run: the call.
        instruction: of the tensor cores that one of its kernels must use, "wgmma" or "mma.sync"; None for none.
        capability: of the GPU, 90 for an H100.
        is_slow: whether only the slow tests compile it.
        stack: bytes of registers that may be spilled.
    """

    id: str
    run: Callable[[], object]
    instruction: str | None
    capability: int = 90
    is_slow: bool = True
    stack: int = 0


class ExpertSizes(NamedTuple):
    hidden: int
    width: int
    experts: int
    top_k: int


V3 = ExpertSizes(7168, 2048, 256, 8)
V2_LITE = ExpertSizes(2048, 1408, 64, 6)  # a width that is no multiple of 256


def compile_cases() -> list[CompileCase]:
    """Of all modules."""
    return expert_cases() + latent_cases()


def expert_cases() -> list[CompileCase]:
    """The experts' block in training, on few tokens and in decoding, with LoRA and with trained weights."""
    lite_4k, v3_16k, v3_2k, v3_one = Experts(V2_LITE, 4096), Experts(V3, 16384), Experts(V3, 2048), Experts(V3, 1)
    wide, half = Experts(V3, 16384, rank=256), Experts(V2_LITE, 4096, dtype=torch.float16)
    a100, whole = {"capability": 80}, Experts(V2_LITE, 4096, dtype=torch.float32)
    return [
        CompileCase("gate and up, V3, LoRA", v3_16k.gate_up, "wgmma", is_slow=False),
        CompileCase("gate and up, V2-Lite, float16", half.gate_up, "wgmma"),
        CompileCase("gate and up, V3, rank 256", wide.gate_up, "wgmma"),
        CompileCase("gate and up, V3, 2,048 tokens", v3_2k.gate_up, "wgmma"),
        CompileCase("gate and up, V3, one token", v3_one.gate_up, "mma.sync", is_slow=False),
        CompileCase("gate and up, V2-Lite, A100", lite_4k.gate_up, "mma.sync", **a100),
        CompileCase("gate and up, float32", whole.gate_up, None),
        CompileCase("down, V3, LoRA", v3_16k.down, "wgmma"),
        CompileCase("down, V3, rank 256", wide.down, "wgmma"),
        CompileCase("down, V3, one token", v3_one.down, "mma.sync"),
        CompileCase("input gradient, V2-Lite", lite_4k.input_gradient, "wgmma"),
        CompileCase("input gradient, V3, LoRA", v3_16k.input_gradient, "wgmma"),
        CompileCase("down, float32", whole.down, None),
        CompileCase("low-rank product, V3", v3_16k.low_rank_product, "wgmma"),
        CompileCase("gate backward, V2-Lite, LoRA", lite_4k.gate_backward, "wgmma"),
        CompileCase("gate backward, V3, rank 256", wide.gate_backward, "wgmma"),
        CompileCase("gate backward, V3, 2,048 tokens", v3_2k.gate_backward, "wgmma"),
        CompileCase("gate backward, V2-Lite, A100", lite_4k.gate_backward, "mma.sync", **a100),
        CompileCase("gate backward, float32", whole.gate_backward, None),
        CompileCase("gate's weight gradient, V3", v3_16k.gate_up_gradient, "wgmma", is_slow=False),
        CompileCase("gate's weight gradient, V3, many rows", Experts(V3, 32768).gate_up_gradient, "wgmma"),
        CompileCase("gate's weight gradient, V2-Lite, A100", lite_4k.gate_up_gradient, "mma.sync", **a100),
        CompileCase("factor gradient, V3", v3_16k.factor_gradient, "mma.sync"),
        CompileCase("sorting, V3", lambda: sort_pairs(v3_16k.ids, V3.experts), None),
        CompileCase("sum of pairs, V3", lambda: sum_pairs(v3_16k.of_pairs(7168), v3_16k.ids, V3.experts), None),
    ]


def latent_cases() -> list[CompileCase]:
    """Decode attention of V2-Lite's 16 heads and V3's 128 over 8,192 tokens."""

    def case(name: str, heads: int, instruction: str | None = "mma.sync", **options) -> CompileCase:
        gpu = {key: options.pop(key) for key in ("capability", "is_slow", "stack") if key in options}
        return CompileCase(f"latent decode, {name}", lambda: attend_latents(heads, **options), instruction, **gpu)

    few_rows = latent_decode.Tiles(16, 32, 4, 3, 1)
    # Triton 3.9 keeps the addresses of all products of a tile at once and spills some; Triton 3.6 spills nothing.
    spilled = {"instruction": "wgmma", "stack": 320}
    return [
        case("V2-Lite", 16),
        case("V2-Lite, no mask", 16, dtype=torch.float16, is_masked=False),
        case("V2-Lite, one split", 16, splits=1),
        case("V2-Lite, FP8", 16, is_fp8=True),
        case("V2-Lite, float32", 16, None, dtype=torch.float32),
        case("V2-Lite, A100", 16, tiles=few_rows, capability=80),
        case("V3, A100, FP8", 128, is_fp8=True, tiles=few_rows, capability=80),
        case("V3", 128, **spilled, is_slow=False),
        case("V3, no mask", 128, **spilled, is_masked=False),
        case("V3, two tokens", 128, **spilled, tokens=2),
        case("V3, FP8", 128, **spilled, is_fp8=True),
    ]


def attend_latents(
    heads: int,
    tokens: int = 1,
    dtype=torch.bfloat16,
    is_masked: bool = True,
    is_fp8: bool = False,
    splits=16,
    tiles=None,
):
    """Over 8,192 tokens of 8 sequences."""
    batch, length = 8, 8192

    def empty(*shape: int, dtype=dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    queries, cached = empty(batch, heads, tokens, 576), empty(batch, length, 576)
    latents, rope, scales = cached[..., :512], cached[..., 512:], None
    if is_fp8:
        latents, scales = empty(batch, length, 512, dtype=torch.uint8), empty(batch, length, 4, dtype=torch.float32)
    mask = empty(batch, tokens, length, dtype=torch.bool) if is_masked else None
    return latent_decode.attend_cache(queries, latents, rope, scales, 0.1, mask, splits, tiles)


class Experts:
    """Tensors without memory of the sizes of a model's experts, and the calls that take them."""

    def __init__(self, sizes: ExpertSizes, tokens: int, rank: int = 16, dtype: torch.dtype = torch.bfloat16):
        self.sizes, self.rank, self.dtype, self.pairs = sizes, rank, dtype, tokens * sizes.top_k
        self.ids = self.empty(tokens, sizes.top_k, dtype=torch.int64)
        self.rows = SortedPairs(
            self.empty(self.pairs, dtype=torch.int32), self.empty(sizes.experts, dtype=torch.int32)
        )
        self.x = self.empty(tokens, sizes.hidden)
        self.w = self.empty(self.pairs, dtype=torch.float32)
        self.gate_up_weight = self.empty(sizes.experts, 2 * sizes.width, sizes.hidden)
        self.down_weight = self.empty(sizes.experts, sizes.hidden, sizes.width)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype or self.dtype, device="meta")

    def of_pairs(self, width: int) -> torch.Tensor:
        return self.empty(self.pairs, width)

    def low(self, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`t` and a factor laid out as `LowRank` lays out B."""
        return self.of_pairs(self.rank), self.empty(self.rank, self.sizes.experts, width).transpose(0, 1)

    def gate_up(self):
        low = self.low(2 * self.sizes.width)
        return gate_up.gate_up_product(self.x, self.gate_up_weight, self.rows, self.sizes.top_k, low, save=True)

    def down(self):
        h, low = self.of_pairs(self.sizes.width), self.low(self.sizes.hidden)
        options = {"transposed": True, "scatter": True, "row_weights": self.w, "low": low}
        return grouped_gemm.rows_product(h, self.down_weight, self.rows, **options)

    def input_gradient(self):
        d_gate_up, low = self.of_pairs(2 * self.sizes.width), self.low(self.sizes.hidden)
        return grouped_gemm.rows_product(
            d_gate_up, self.gate_up_weight, self.rows, transposed=False, scatter=True, low=low
        )

    def low_rank_product(self):
        A = self.empty(self.sizes.experts, self.rank, self.sizes.hidden)
        return grouped_gemm.rows_product(self.x, A, self.rows, transposed=True, gather=self.sizes.top_k)

    def gate_backward(self):
        saved, low = self.of_pairs(2 * self.sizes.width), self.low(self.sizes.width)
        arguments = (self.x, self.down_weight, saved, self.w, self.rows, self.sizes.top_k, low)
        return gate_up.gate_backward(*arguments, save_h=True)

    def gate_up_gradient(self):
        d_gate_up = self.of_pairs(2 * self.sizes.width)
        return weight_gradient.weight_gradient(
            d_gate_up, self.x, self.rows, gather_right=self.sizes.top_k, dtype=self.dtype
        )

    def factor_gradient(self):
        u, options = self.of_pairs(self.rank), {"gather_right": self.sizes.top_k, "row_weights": self.w}
        return weight_gradient.weight_gradient(u, self.x, self.rows, dtype=torch.float32, **options)


def launches(case: CompileCase) -> list[tuple]:
    """Kernel, arguments and options of each launch."""
    recorded = []

    def record(kernel, grid, *arguments, **options) -> None:
        recorded.append((kernel, arguments, options))

    with ExitStack() as patches:
        for module in MODULES:
            patches.enter_context(patch.object(module, "launch", record))
            if hasattr(module, "shared_memory"):
                room = SHARED_MEMORY[case.capability]
                patches.enter_context(patch.object(module, "shared_memory", lambda device, room=room: room))
        case.run()
    return recorded


def compiled(kernel, arguments: tuple, options: dict, capability: int) -> dict:
    """What the compiler made of one launch: registers, stack and shared memory in bytes, counts of instructions."""
    signature, constants, attributes = {}, {}, {}
    options = dict(options)
    values = dict(zip(kernel.arg_names, arguments, strict=False))
    values |= {name: options.pop(name) for name in kernel.arg_names if name in options}
    for place, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = _POINTERS[value.dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]  # as the allocator places tensors
        elif parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[(place,)] = value
        else:
            signature[parameter.name] = "i32" if isinstance(value, int) else "fp32"
            if isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        command = [_TOOLS / "cuobjdump", "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    resources = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    instructions = {name: result.asm["ptx"].count(f"{name}.") for name in ("wgmma", "mma.sync")}
    return {"kernel": kernel.__name__, **resources, "shared": result.metadata.shared, **instructions}


if __name__ == "__main__":
    for case in compile_cases():
        if case.id in sys.argv[1:]:
            results = [compiled(*launch, case.capability) for launch in launches(case)]
            print(json.dumps({"id": case.id, "results": results}), flush=True)
