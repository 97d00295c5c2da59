"""Every path of half-precision products, forward and backward, beside the plain one: run here, or as a program.

python tests/support/half_paths.py      checks all of them on this machine, and prints the kind it is
"""

import copy
from collections.abc import Callable, Iterable

import pytest
import torch
import torch.nn.functional as F
from adapted_experts import RANKS, cast, gradients, make_adapters, make_experts, make_inputs, reference
from peft import LoraConfig, get_peft_model
from tiny import tiny_config, tiny_model
from torch import nn
from transformers import DynamicCache

from modeling_deepseek_moe import attention, linear
from modeling_deepseek_moe.chunked_loss import chunked_cross_entropy
from modeling_deepseek_moe.cpu_rules import machine
from modeling_deepseek_moe.kernels.sorted.experts import sorted_experts
from modeling_deepseek_moe.quantized.weights import quantize

# Sides of a comparison: ours in half precision, the plain one in half precision, the plain one in float64.
Sides = tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]


def linear_layer(dtype: torch.dtype, rows: int, bias: bool = False) -> Sides:
    layer, x = nn.Linear(96, 160, bias=bias).to(dtype), torch.randn(2, rows, 96).to(dtype)

    def run(layer: nn.Module, x: torch.Tensor, call: Callable) -> list[torch.Tensor]:
        return _differentiated(lambda x: call(layer, x), x, layer.parameters())

    return (
        run(layer, x, linear.call_linear),
        run(layer, x, nn.Linear.forward),
        run(copy.deepcopy(layer).double(), x.double(), nn.Linear.forward),
    )


def adapted_linear_layer(dtype: torch.dtype) -> Sides:
    base = nn.Sequential()
    base.proj = nn.Linear(96, 160, bias=False).to(dtype)
    model = get_peft_model(base, LoraConfig(target_modules=["proj"], init_lora_weights=False, use_dora=True))
    layer, x = model.base_model.model.proj, torch.randn(20, 96).to(dtype)
    trained = [p for p in layer.parameters() if p.requires_grad]
    exact = copy.deepcopy(layer).double()
    return (
        _differentiated(lambda x: linear.call_linear(layer, x), x, trained),
        _differentiated(layer, x, trained),
        _differentiated(exact, x.double(), [p for p in exact.parameters() if p.requires_grad]),
    )


def experts(dtype: torch.dtype, ranks: str, trained: bool, tokens: int) -> Sides:
    layer, adapters = make_experts(dtype, trained), make_adapters(RANKS[ranks])
    inputs = make_inputs("uniform", tokens, dtype)
    exact = tuple(t.detach().double().requires_grad_() if t.is_floating_point() else t for t in inputs)
    return (
        gradients(sorted_experts, layer, inputs, adapters),
        gradients(reference, layer, inputs, cast(adapters, dtype)),
        gradients(reference, copy.deepcopy(layer).double(), exact, cast(adapters, torch.float64)),
    )


def attention_layer(dtype: torch.dtype, implementation: str, tokens: int, cached: int) -> Sides:
    """Latent attention; absorbed where there is a cache. The plain one is the expanded form."""
    config = tiny_config("v2", attn_implementation=implementation)
    model = tiny_model(config).train()
    layer, rotary = model.model.layers[0].self_attn, model.model.rotary_emb
    prefix, x = torch.randn(2, cached, config.hidden_size), torch.randn(2, tokens, config.hidden_size)
    mask = torch.ones(tokens, cached + tokens, dtype=torch.bool).tril(cached)[None, None]

    def run(dtype: torch.dtype, is_plain: bool) -> list[torch.Tensor]:
        own, cache = copy.deepcopy(layer).to(dtype), DynamicCache(config=config)
        seen = (
            mask
            if implementation == "sdpa"
            else torch.zeros((), dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
        )
        places = torch.arange(cached + tokens)[None].split([cached, tokens], dim=1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention, "absorbed_is_cheaper", lambda *_: cached > 0 and not is_plain)
            if is_plain:
                patch.setattr(attention, "goes_through_float32", lambda *_: False)
                patch.setattr(attention, "call_linear", lambda layer, x: layer(x))
            if cached:
                with torch.no_grad():
                    own(prefix.to(dtype), rotary(prefix.to(dtype), places[0]), past_key_values=cache)

            def forward(x: torch.Tensor) -> torch.Tensor:
                return own(x, rotary(x, places[1]), seen, past_key_values=cache)[0]

            return _differentiated(forward, x.to(dtype), own.parameters())

    return run(dtype, False), run(dtype, True), run(torch.float64, True)


def loss_in_chunks(dtype: torch.dtype) -> Sides:
    hidden, head = torch.randn(50, 32).to(dtype), torch.randn(300, 32).to(dtype)
    targets = torch.randint(300, (50,))
    targets[::7] = -100

    def run(hidden: torch.Tensor, head: torch.Tensor, loss: Callable) -> list[torch.Tensor]:
        hidden, head = (tensor.clone().requires_grad_() for tensor in (hidden, head))
        return _differentiated(lambda hidden: loss(hidden, head), hidden, [head])

    def whole(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        logits = F.linear(hidden, head)
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="sum")

    return (
        run(hidden, head, lambda *tensors: chunked_cross_entropy(*tensors, targets, 4 * 300 * 16)[0]),
        run(hidden, head, whole),
        run(hidden.double(), head.double(), whole),
    )


def four_bits(dtype: torch.dtype) -> Sides:
    layer, x = nn.Linear(128, 192, bias=False).to(dtype).requires_grad_(False), torch.randn(2, 20, 128).to(dtype)
    weight = quantize(layer.weight)
    values = weight.dequantize()
    return (
        _differentiated(lambda x: F.linear(x, weight), x, []),
        _differentiated(lambda x: F.linear(x, values), x, []),
        _differentiated(lambda x: F.linear(x, values.double()), x.double(), []),
    )


PATHS: dict[str, Callable[[torch.dtype], Sides]] = {
    "a linear layer, one token": lambda dtype: linear_layer(dtype, 1),
    "a linear layer": lambda dtype: linear_layer(dtype, 40),
    "a linear layer with a bias": lambda dtype: linear_layer(dtype, 40, bias=True),
    "a linear layer of PEFT": adapted_linear_layer,
    "frozen experts": lambda dtype: experts(dtype, "no adapter", False, 40),
    "trained experts": lambda dtype: experts(dtype, "no adapter", True, 211),
    "experts with LoRA": lambda dtype: experts(dtype, "several, of different ranks", False, 211),
    "trained experts with LoRA": lambda dtype: experts(dtype, "both", True, 40),
    "attention, sdpa": lambda dtype: attention_layer(dtype, "sdpa", 40, 0),
    "attention, eager": lambda dtype: attention_layer(dtype, "eager", 40, 0),
    "absorbed attention, one token": lambda dtype: attention_layer(dtype, "sdpa", 1, 45),
    "absorbed attention": lambda dtype: attention_layer(dtype, "eager", 5, 70),
    "the loss in chunks": loss_in_chunks,
    "four bits": four_bits,
}


def check(name: str, dtype: torch.dtype) -> None:
    """AssertionError if the path is less exact than the plain one in any output or gradient."""
    torch.manual_seed(0)
    for place, (ours, plain, exact) in enumerate(zip(*PATHS[name](dtype), strict=True)):
        assert ours.shape == exact.shape and (place or ours.dtype == plain.dtype), (name, place)
        wrong, usual = ((side.double() - exact.double()).norm() for side in (ours, plain))
        # Both round some times, at different places; what is rounded least is of one rounding.
        slack = torch.finfo(dtype).eps / 2 * exact.double().norm()
        assert wrong <= 1.25 * usual + slack, f"{name}, {place}: off by {wrong:.2e}, the plain one {usual:.2e}"


def _differentiated(function: Callable, x: torch.Tensor, others: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The output of `function(x)`, then the gradients of x and of the others, for a fixed upstream gradient."""
    x = x.detach().clone().requires_grad_()
    leaves = [x, *(tensor for tensor in others if tensor.requires_grad)]
    output = function(x)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    found = torch.autograd.grad(output, leaves, upstream, allow_unused=True, materialize_grads=True)
    return [output.detach(), *found]


if __name__ == "__main__":
    for dtype in (torch.bfloat16, torch.float16):
        for name in PATHS:
            check(name, dtype)
    print(machine())
