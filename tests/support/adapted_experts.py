"""Experts of a small layer with adapters in PEFT's layout, and the eager experts with `W + B A` written out."""

import torch
from tiny import tiny_config
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modeling_deepseek_moe.experts import DeepseekMoeExperts
from modeling_deepseek_moe.kernels.sorted.low_rank import Adapter

EXPERTS, HIDDEN, WIDTH, SLOTS = 8, 32, 16, 3


WEIGHTS = {"gate_up_proj": (2 * WIDTH, HIDDEN), "down_proj": (HIDDEN, WIDTH)}


SCALINGS = (0.7, 2.0)

ROUTINGS = {
    "uniform": lambda tokens: torch.rand(tokens, EXPERTS).topk(SLOTS).indices,
    "two experts empty": lambda tokens: torch.rand(tokens, EXPERTS - 2).topk(SLOTS).indices + 1,
    "all tokens to three experts": lambda tokens: torch.tensor([[6, 0, 3]]).expand(tokens, SLOTS),
    "some served elsewhere": lambda tokens: torch.rand(tokens, EXPERTS + 1).topk(SLOTS).indices,
}
RANKS = {
    "both": {"gate_up_proj": [4], "down_proj": [4]},
    "gate_up alone": {"gate_up_proj": [3], "down_proj": []},
    "down alone": {"gate_up_proj": [], "down_proj": [3]},
    "no adapter": {"gate_up_proj": [], "down_proj": []},
    "several, of different ranks": {"gate_up_proj": [4, 1], "down_proj": [2, 3]},
}


def make_experts(dtype=torch.float32, trained: bool = False) -> DeepseekMoeExperts:
    experts = DeepseekMoeExperts(tiny_config("v3", n_routed_experts=EXPERTS))
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return experts.to(dtype).requires_grad_(trained)


def make_adapters(ranks: dict[str, list[int]], dtype=torch.float32) -> dict[str, list[Adapter]]:
    return {
        name: [
            Adapter(
                (0.3 * torch.randn(rank * EXPERTS, WEIGHTS[name][1])).to(dtype).requires_grad_(),
                (0.3 * torch.randn(WEIGHTS[name][0], rank * EXPERTS)).to(dtype).requires_grad_(),
                scaling,
            )
            for rank, scaling in zip(ranks_of_weight, SCALINGS, strict=False)
        ]
        for name, ranks_of_weight in ranks.items()
    }


def make_inputs(routing: str, tokens: int, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden_states = torch.randn(tokens, HIDDEN).to(dtype).requires_grad_()
    return hidden_states, ROUTINGS[routing](tokens), torch.rand(tokens, SLOTS).requires_grad_()


def reference(experts, hidden_states, index, weights, gate_up, down) -> torch.Tensor:
    """The eager experts on `W + scaling B A`, in PEFT's layout of A and B."""
    adapted = {}
    for name, adapters in zip(WEIGHTS, (gate_up, down), strict=True):
        adapted[name] = getattr(experts, name)
        for A, B, scaling in adapters:
            per_expert = B.unflatten(1, (-1, EXPERTS)), A.unflatten(0, (EXPERTS, -1))
            adapted[name] = adapted[name] + scaling * torch.einsum("ore,eri->eoi", *per_expert)
    experts.config._experts_implementation = "eager"
    return functional_call(experts, adapted, (hidden_states, index, weights))


def cast(adapters: dict[str, list[Adapter]], dtype: torch.dtype) -> dict[str, list[Adapter]]:
    return {
        name: [Adapter(*(f.detach().to(dtype).requires_grad_() for f in (A, B)), scaling) for A, B, scaling in part]
        for name, part in adapters.items()
    }


def gradients(function, experts, inputs, adapters) -> list[torch.Tensor]:
    """The output, then the gradients of hidden states, routing weights, trained weights and all factors."""
    leaves = [inputs[0], inputs[2], *(weight for weight in experts.parameters() if weight.requires_grad)]
    leaves += [f for part in adapters.values() for adapter in part for f in adapter[:2]]
    output = function(experts, *inputs, *adapters.values())
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output.dtype)
    return [output, *torch.autograd.grad(output, leaves, upstream, allow_unused=True, materialize_grads=True)]


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """float32: sums of at most a few hundred products in another order, so errors go with the largest entry."""
    bound = 1e-5 * expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=bound)


class LargestTensor(TorchDispatchMode):
    """Keeps the number of elements of the largest tensor that an operation made, views of what it was given aside."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.numel = max(self.numel, tensor.numel())
        return result
