"""How LoRA on stacked experts starts: expert by expert as PEFT starts a linear layer, and without changing the base.

Some starts take the adapters out of the base weights (PiSSA, arXiv 2404.02948; OLoRA, arXiv 2406.01775), so what is
saved fits only a base that was changed in the same way. `initial_factors`, taken before training, and
`save_plain_lora` afterwards give an adapter for the base as it was, with twice the rank: what training added is
`B A - B_0 A_0`.

E experts of rank r: a stacked A is `[E r, in]`, expert after expert; B is `[out, r E]`, with the experts innermost.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners import lora
from peft.utils.integrations import gather_params_ctx
from safetensors.torch import load_file, save_file

_OF_STACKS = re.compile(r"gaussian|orthogonal|olora|pissa(?:_niter_(?P<iterations>[1-9]\d*))?")
_CHANGES_BASE = re.compile(r"(?:pissa|corda).*|olora|loftq|lora_ga")
_CHOICES = "true, false, gaussian, orthogonal, olora, pissa, pissa_niter_[number]"


def changes_base(init_lora_weights: bool | str | None) -> bool:
    """Whether adapters that start so take their part out of the base weights."""
    return isinstance(init_lora_weights, str) and _CHANGES_BASE.fullmatch(init_lora_weights.lower()) is not None


def check_start(init_lora_weights: bool | str | None, what: str) -> None:
    """Raise a ValueError for a start that adapters of stacked or bare weights cannot have.

    Args:
        init_lora_weights: the field of `peft.LoraConfig`.
        what: the weights, for the message.
    """
    if isinstance(init_lora_weights, str) and not _OF_STACKS.fullmatch(init_lora_weights.lower()):
        raise ValueError(
            f"init_lora_weights={init_lora_weights!r} starts adapters of linear modules alone, not of {what}: choose "
            f"one of {_CHOICES}, or leave {what} out"
        )


@torch.no_grad()
def start_stacked(wrapper: lora.ParamWrapper, adapter_name: str, init_lora_weights: str) -> None:
    """Gives the factors of one stacked weight the values, and the weight the rest, that PEFT gives linear layers.

    Args:
        wrapper: of the weight `[E, out, in]`, with the adapter in it.
        adapter_name: of the adapter.
        init_lora_weights: "orthogonal", "olora", "pissa" or "pissa_niter_[number]".

    Raises:
        ValueError: a rank that the matrices do not have, or weights that cannot be changed.
    """
    how, rank = init_lora_weights.lower(), wrapper.r[adapter_name]
    scaling = wrapper.scaling[adapter_name]
    factors = wrapper.lora_A[adapter_name].weight, wrapper.lora_B[adapter_name].weight
    with gather_params_ctx(wrapper.get_param()):
        weight = wrapper.get_param()
        _check_weight(weight, wrapper.parameter_name, how, rank)
        if weight.is_meta:
            return
        a_Eri = torch.empty(len(weight), rank, weight.shape[2], device=weight.device)
        b_orE = torch.empty(weight.shape[1], rank, len(weight), device=weight.device)
        for expert in range(len(weight)):
            if how == "orthogonal":
                a, b = _orthogonal(*weight.shape[1:], rank)
            else:
                matrix = weight[expert].float()
                a, b = _decomposition(how)(matrix, rank, scaling)
                weight[expert].copy_(matrix - (scaling * b) @ a)
            a_Eri[expert], b_orE[..., expert] = a, b
    for factor, start in zip(factors, (a_Eri.flatten(0, 1), b_orE.flatten(1)), strict=True):
        if not factor.is_meta:  # as it is where the values of a saved adapter follow
            factor.copy_(start)


def initial_factors(model: PeftModel, adapter_name: str = "default") -> dict[str, torch.Tensor]:
    """Copies in main memory of the adapter as it is before training, for `save_plain_lora`."""
    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    return {key: tensor.detach().to("cpu", copy=True) for key, tensor in state.items() if ".lora_" in key}


def save_plain_lora(
    model: PeftModel,
    folder: str | os.PathLike,
    initial: dict[str, torch.Tensor],
    state_dict: dict[str, torch.Tensor] | None = None,
) -> None:
    """Saves the adapter "default", whose start changed the base weights, as plain LoRA on the base as it was.

    Args:
        model: with the trained adapter.
        folder: as for `PeftModel.save_pretrained`.
        initial: what `initial_factors` gave before the training.
        state_dict: whole weights of what is trained; None for the model's own.
    """
    model.save_pretrained(folder, state_dict=state_dict)
    weights, config = Path(folder) / "adapter_model.safetensors", Path(folder) / "adapter_config.json"
    experts = {name: wrapper.num_experts for name, wrapper in model.named_modules() if hasattr(wrapper, "num_experts")}
    tensors = load_file(weights)
    for key, start in initial.items():
        module, _, factor = key.removesuffix(".weight").rpartition(".lora_")
        count = experts.get(module, 1)
        if factor == "A":
            parts = [tensor.unflatten(0, (count, -1)) for tensor in (tensors[key], start)]
            tensors[key] = torch.cat(parts, dim=1).flatten(0, 1)
        else:
            parts = [tensor.unflatten(1, (-1, count)) for tensor in (tensors[key], -start)]
            tensors[key] = torch.cat(parts, dim=1).flatten(1)
    save_file(tensors, weights, metadata={"format": "pt"})
    fields = json.loads(config.read_text(encoding="utf-8"))
    # alpha / r stays, and so does alpha / sqrt(r) with use_rslora.
    times = 2**0.5 if fields["use_rslora"] else 2
    fields |= {"init_lora_weights": True, "r": 2 * fields["r"], "lora_alpha": times * fields["lora_alpha"]}
    fields["rank_pattern"] = {name: 2 * rank for name, rank in (fields["rank_pattern"] or {}).items()}
    fields["alpha_pattern"] = {name: times * alpha for name, alpha in (fields["alpha_pattern"] or {}).items()}
    config.write_text(json.dumps(fields, indent=2, sort_keys=True), encoding="utf-8")


def _check_weight(weight: torch.Tensor, name: str, how: str, rank: int) -> None:
    if how == "orthogonal":
        if rank % 2:
            raise ValueError(f"init_lora_weights='orthogonal' needs an even rank, and that of {name} is {rank}")
        return
    if type(weight) not in (torch.Tensor, torch.nn.Parameter) or not weight.is_floating_point():
        raise ValueError(
            f"init_lora_weights={how!r} changes the base weights, and {name} is quantised or sharded "
            f"({type(weight).__name__}, {weight.dtype}): choose a start that leaves them, such as true"
        )
    if rank > min(weight.shape[1:]):
        raise ValueError(
            f"init_lora_weights={how!r} takes the rank of {name} from matrices of {list(weight.shape[1:])}, which "
            f"have no {rank}: give a smaller one"
        )


Decomposition = Callable[[torch.Tensor, int, float], tuple[torch.Tensor, torch.Tensor]]


def _decomposition(how: str) -> Decomposition:
    if how == "olora":
        return _olora
    iterations = _OF_STACKS.fullmatch(how)["iterations"]

    def pissa(matrix: torch.Tensor, rank: int, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
        if iterations is None:
            left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        else:
            left, values, right = torch.svd_lowrank(matrix, rank, niter=int(iterations))
            right = right.t()
        roots = (values[:rank] / scaling).sqrt()
        return roots[:, None] * right[:rank], left[:, :rank] * roots

    return pissa


def _olora(matrix: torch.Tensor, rank: int, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    q, r = torch.linalg.qr(matrix)
    return r[:rank], q[:, :rank]


def _orthogonal(rows: int, columns: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random factors whose product is zero: A and B keep to halves of the rank that are orthogonal to each other."""
    q, _ = torch.linalg.qr(torch.randn(rank, rank))
    a = torch.randn(columns, rank // 2).mm(q[0::2]).t() / 10
    b = torch.randn(rank // 2, rows).t().mm(q[1::2]) / 10
    return a, b
