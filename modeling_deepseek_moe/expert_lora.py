"""LoRA on stacked routed experts that never builds `W + B A`: the low-rank path runs on the tokens of each expert.

PEFT's own layer for stacked weights adds `B A` to the weights of all experts in every forward pass, and differentiates
that in the backward pass. The layer here keeps PEFT's parameters, names, merging and files, and replaces the pass:

    model = get_peft_model(model, register_expert_lora(config, model))
    model = load_adapter(model, "folder or Hub id")  # PeftModel.from_pretrained would give PEFT's own layer

It serves every class that follows transformers' experts interface with `gate_up_proj [E, 2I, H]` and
`down_proj [E, H, I]` without biases: DeepseekMoe, `deepseek_v3`, Qwen3-MoE, Mixtral, OLMoE and their like.
"""

import copy
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict, load_peft_weights
from peft.tuners import lora
from torch import nn

from ._compat import (
    check_forward_args,
    experts_implementation,
    follows_experts_interface,
    has_hooks,
    is_dtensor,
    is_expert_parallel,
    is_of_peft,
    register_layers,
)
from .expert_lora_start import changes_base, check_start, start_stacked
from .kernels.sorted.experts import sorted_experts
from .kernels.sorted.low_rank import Adapter
from .kernels.sorted.sorted_mm import interface_departure
from .parallel_adapters import fit_to_spread
from .quantized.weights import NF4Weight

# Names of one and the same product: computing it here changes the order of some additions and nothing else.
_SAME_PRODUCT = ("eager", "grouped_mm", "batched_mm", "sorted_mm", "triton", None)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_WEIGHTS = ("gate_up_proj", "down_proj")
_KINDS = (nn.Parameter, torch.Tensor, NF4Weight)
_ONE_EXPERT = re.compile(r"(.+\.experts)\.\d+\.")
_WRAPPERS = ("", ".base_layer")
_OF_EXPERTS = (".gate_proj", ".up_proj", ".down_proj")


class ParamWrapper(lora.ParamWrapper):
    """PEFT's wrapper of one stacked weight, with a pass whose work grows with the tokens and not with the experts.

    PEFT recognises wrappers of parameters by this name. The outermost wrapper of an experts module does the work of
    all of them. The experts' own products are computed here too, in the dtype of their weights: by Triton's kernels
    where `experts_implementation` is "triton", by `sorted_experts` where it is "eager", "grouped_mm", "batched_mm" or
    "sorted_mm". Only where all adapters are disabled or merged does the named one run.

    Under the expert parallelism of transformers' `DistributedConfig` the factors are DTensors, a rank having those of
    its own experts, and the experts' forward runs around the same products.

    PEFT's pass is taken, with a warning that says why, where this one could differ from it: another
    `experts_implementation`, hooks on the experts, base weights that are sharded or quantised otherwise than by
    `quantized_weights`; base weights that are quantised so, or expert parallel, make it a ValueError.
    Several adapters are added up by activating them together; PEFT has no `add_weighted_adapter` for stacked weights.
    `torch.compile` breaks its graph here, but not with "triton".
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`hidden_states [N, H], top_k_index [N, K], top_k_weights [N, K]` -> `[N, H]`, as the experts' forward."""
        check_forward_args(self, x, *args, **kwargs)
        chain = list(self._chain())
        adapters = {wrapper.parameter_name: _active_adapters(wrapper) for wrapper in chain}
        experts = self.get_base_layer()
        if not any(adapters.values()) or _is_in_pefts_pass(experts):
            return super().forward(x, *args, **kwargs)
        reason = _needs_peft(chain, experts)
        if reason is None and (kwargs or len(args) != 2):
            reason = "the experts are not called with (hidden_states, top_k_index, top_k_weights)"
        for kind, is_so in (("in four bits", _in_four_bits), ("under expert parallelism", is_expert_parallel)):
            if reason is not None and is_so(experts):
                raise ValueError(f"LoRA on routed experts {kind} cannot be computed: {reason}")
        if reason is not None:
            warnings.warn(f"LoRA on routed experts builds W + B A of all of them: {reason}", stacklevel=2)
            return super().forward(x, *args, **kwargs)
        lists = [adapters.get(name, []) for name in _WEIGHTS]
        body = _body(experts)
        if not is_expert_parallel(experts):
            return body(experts, x, *args, *lists)
        from .expert_lora_parallel import run_adapted

        return run_adapted(experts, body, lists, x, *args)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Adds an adapter, as PEFT's layer does; it can also start as `start_stacked` says, each expert by itself."""
        how = config.init_lora_weights
        check_start(how, self.parameter_name)
        is_own = isinstance(how, str) and how.lower() != "gaussian"
        if is_own:
            config = copy.copy(config)
            config.init_lora_weights = False
        super().update_layer(adapter_name, r, lora_alpha, config=config, **kwargs)
        if is_own:
            start_stacked(self, adapter_name, how)
        if is_expert_parallel(experts := self.get_base_layer()):
            # Imported where processes are several.
            from .expert_lora_parallel import layout_of, spread_factors

            self._layout = layout_of(experts, self.parameter_name)
            spread_factors(self, adapter_name, self._layout)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merges, as PEFT's layer does.

        Raises:
            ValueError: the experts are spread over ranks.
        """
        if is_expert_parallel(self.get_base_layer()):
            raise ValueError(
                "LoRA on routed experts under expert parallelism is not merged: save the adapter, and merge it by "
                "`deepseek-moe convert MODEL DST --to bf16 --adapter ADAPTER`, or in one process"
            )
        super().merge(safe_merge, adapter_names)

    def _chain(self) -> "Iterator[lora.ParamWrapper]":
        module = self
        while isinstance(module, lora.ParamWrapper):
            yield module
            module = module.base_layer


def register_expert_lora(lora_config: LoraConfig, model: nn.Module) -> LoraConfig:
    """Let `get_peft_model(model, lora_config)` put the layer of this module on the routed experts it adapts.

    Args:
        lora_config: names stacked weights in `target_parameters`, such as `["experts.gate_up_proj"]`. What it
            targets, and what is saved of it, stays as it is.
        model: the model that will be adapted.

    Returns:
        `lora_config`.

    Raises:
        ValueError: targeted experts do not follow the interface, or the model has none that do, or it is spread over
            processes in a way that no adapters are right for.
    """
    fit_to_spread(lora_config, model)
    classes = _classes(lora_config, model)
    if not classes:
        raise ValueError(f"{type(model).__name__} has no routed experts that follow transformers' experts interface")
    register_layers(lora_config, dict.fromkeys(classes, ParamWrapper))
    return lora_config


def load_adapter(
    model: nn.Module, adapter: str, adapter_name: str = "default", is_trainable: bool = False, **options: Any
) -> PeftModel:
    """`PeftModel.from_pretrained` with the layer of this module on the routed experts.

    Args:
        model: the base model, or a `PeftModel` that gets one adapter more; experts that it adapts already keep
            their layer.
        adapter: folder or Hub id of an adapter saved by PEFT.
        adapter_name, is_trainable, **options: as in `PeftModel.from_pretrained`.

    Raises:
        ValueError: the model has no place for a part of the adapter, which PEFT would leave out in silence, or the
            adapter belongs to base weights that cannot be had again.
    """
    location = {key: options[key] for key in ("subfolder", "revision", "cache_dir", "token") if key in options}
    config = PeftConfig.from_pretrained(adapter, **location)
    config.inference_mode = not is_trainable
    if isinstance(config, LoraConfig):
        _check_base(adapter, config)
        if _classes(config, model):
            register_expert_lora(config, model)
    if not isinstance(model, PeftModel):
        model = PeftModel.from_pretrained(model, adapter, adapter_name, is_trainable, config=config, **options)
    else:
        if adapter_name not in model.peft_config:
            model.add_adapter(adapter_name, config)
            model.set_requires_grad(adapter_name, requires_grad=is_trainable)
        model.load_adapter(adapter, adapter_name, is_trainable=is_trainable, **options)
    if isinstance(config, LoraConfig) and not options.get("key_mapping"):
        _check_places(model, adapter, adapter_name, location)
    return model


def _check_base(adapter: str, config: LoraConfig) -> None:
    """The start of an adapter matters for what it did to the base weights; its own first values are replaced."""
    how = config.init_lora_weights
    if not changes_base(how):
        config.init_lora_weights = True
    elif "_niter_" in how:
        raise ValueError(
            f"adapter {adapter!r} started with init_lora_weights={how!r}, a random decomposition of the base weights "
            "that cannot be repeated: save it by `modeling_deepseek_moe.expert_lora_start.save_plain_lora`, as runs do"
        )


def _check_places(model: PeftModel, adapter: str, adapter_name: str, location: dict[str, Any]) -> None:
    own = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False).keys()
    for key in sorted(name for name in load_peft_weights(adapter, "cpu", **location) if ".lora_" in name):
        experts = _ONE_EXPERT.match(key)  # PEFT stacks them where it knows the model
        if key in own or (experts and not own.isdisjoint(f"{experts[1]}{inner}.lora_A.weight" for inner in _WRAPPERS)):
            continue
        hint = ""
        if not experts and key.partition(".lora_")[0].endswith(_OF_EXPERTS):
            model_type = model.get_base_model().config.model_type
            hint = (
                f" (PEFT takes targets of this name for routed experts in models of type {model_type}: "
                "deepseek-moe convert ADAPTER TARGET --to peft-native)"
            )
        raise ValueError(f"adapter {adapter!r} does not fit the model, which has no place for {key}{hint}")


def _classes(lora_config: LoraConfig, model: nn.Module) -> set[type[nn.Module]]:
    """Classes of the model's experts that can be served here."""
    classes = set()
    for name, module in model.named_modules():
        stacked = [key for key, parameter in module.named_parameters(recurse=False) if len(_shape(parameter)) == 3]
        if not stacked:
            continue
        departure = _departure(module)
        if departure is None:
            classes.add(type(module))
        elif _targets(lora_config, name, stacked):
            raise ValueError(f"{name} ({type(module).__name__}) {departure}: only PEFT's own layer can adapt it")
    return classes


def _targets(lora_config: LoraConfig, module: str, parameters: Iterable[str]) -> bool:
    names = [f".{module}.{parameter}".replace(".base_layer", "") for parameter in parameters]
    return any(name.endswith(f".{target}") for name in names for target in lora_config.target_parameters or ())


def _shape(parameter: torch.Tensor) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))  # DeepSpeed ZeRO-3 keeps the whole one there


def _departure(experts: nn.Module) -> str | None:
    """What keeps a module with stacked weights from being served here."""
    if not follows_experts_interface(experts):
        return "does not follow transformers' experts interface"
    if departure := interface_departure(experts):
        return f"has {departure}"
    gate_up, down = (_shape(getattr(experts, name, torch.empty(0))) for name in _WEIGHTS)
    if len(gate_up) != 3 or down != (gate_up[0], gate_up[2], gate_up[1] // 2):
        return f"has gate_up_proj {gate_up} and down_proj {down}, not (E, 2I, H) and (E, H, I)"
    return None


def _active_adapters(wrapper: ParamWrapper) -> list[Adapter]:
    if wrapper.disable_adapters or wrapper.merged:
        return []
    return [
        Adapter(*_factors(wrapper, name), wrapper.scaling[name])
        for name in wrapper.active_adapters
        if name in wrapper.lora_A
    ]


def _factors(wrapper: ParamWrapper, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
    if not is_expert_parallel(wrapper.get_base_layer()):
        return wrapper.lora_A[adapter_name].weight, wrapper.lora_B[adapter_name].weight
    from .expert_lora_parallel import local_factors

    return local_factors(wrapper, adapter_name, wrapper._layout)


def _body(experts: nn.Module) -> Callable[..., torch.Tensor]:
    if experts_implementation(experts.config) != "triton":
        return sorted_experts
    # Triton is imported where it is used: not every platform has it.
    from .kernels.triton.experts import triton_experts

    return triton_experts


def _is_in_pefts_pass(experts: nn.Module) -> bool:
    """Whether a wrapper around has already added its `B A` to the weights."""
    lists = getattr(experts, "parametrizations", {}).values()
    return any(is_of_peft(parametrization) for each in lists for parametrization in each)


def _in_four_bits(experts: nn.Module) -> bool:
    return any(isinstance(getattr(experts, name), NF4Weight) for name in _WEIGHTS)


def _needs_peft(chain: list[lora.ParamWrapper], experts: nn.Module) -> str | None:
    """Why the result, or a side effect, could differ from that of PEFT's pass."""
    if (name := experts_implementation(experts.config)) not in _SAME_PRODUCT:
        return f"experts_implementation={name!r} is not one of {', '.join(_SAME_PRODUCT[:-1])}"
    if hasattr(experts, "parametrizations"):
        return "the base weights are parametrized"
    if other := [wrapper.parameter_name for wrapper in chain if wrapper.parameter_name not in _WEIGHTS]:
        return f"{other[0]} is adapted too"
    is_parallel = is_expert_parallel(experts)
    for name in _WEIGHTS:
        weight = getattr(experts, name)
        is_known = type(weight) in _KINDS or (is_parallel and is_dtensor(weight))
        if not is_known or weight.ndim != 3 or weight.dtype not in _DTYPES:
            return f"{name} is quantised or sharded ({type(weight).__name__}, {weight.dtype})"
    # Expert parallel ones are called, and theirs run.
    for module in (*chain[1:], *([] if is_parallel else [experts])):
        if has_hooks(module):
            return f"{type(module).__name__} has hooks"
    return None
