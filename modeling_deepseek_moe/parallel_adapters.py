"""PEFT adapters on a model that transformers' `DistributedConfig` spread over processes when it was loaded.

    model = AutoModelForCausalLM.from_pretrained(name, distributed_config=DistributedConfig(fsdp_size=8, ep_size=8))
    model = get_peft_model(model, register_expert_lora(config, model))
    Trainer(model, ...).train()
    save_adapter(model, "adapter")  # in every process

Every rank has the factors of its own experts (`expert_lora_parallel`) and a copy of each other adapter. Trainer keeps
the copies equal; a training loop of one's own calls `average_copies` once.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from accelerate.state import GradientState
from peft import LoraConfig, PeftModel
from peft.tuners import lora
from torch import distributed, nn

from ._compat import distributed_config, is_dtensor, register_layers

_REFUSED = {
    "tp_size": "PEFT has no adapters of experts for it, gives those of layers that are cut by rows the wrong width, "
    "and leaves the gradient of kv_a_proj_with_mqa in parts: give these ranks to fsdp_size and ep_size",
    "pp_size": "adapters of other stages were never tried: give these ranks to fsdp_size and ep_size",
}


class Linear(lora.Linear):
    """PEFT's layer, for a linear module whose weight FSDP keeps in parts and gathers to compute.

    PEFT 0.21 takes the parts for those of tensor parallelism where the mesh has replicas, too.
    """

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        """Adds an adapter of the module's own width."""
        module = self.get_base_layer()
        self.in_features, self.out_features = module.in_features, module.out_features
        super().update_layer(*args, **kwargs)


def fit_to_spread(lora_config: LoraConfig, model: nn.Module) -> None:
    """Lets `get_peft_model(model, lora_config)` make adapters that are right for a model spread over processes.

    Args:
        lora_config: what it targets, and what is saved of it, stays as it is.
        model: base model, or a `PeftModel`; may be in one piece.

    Raises:
        ValueError: no adapters would be right.
    """
    config = distributed_config(getattr(model, "config", None))
    for axis, reason in _REFUSED.items():
        if (size := getattr(config, axis, 1) or 1) > 1:
            raise ValueError(f"LoRA on a model that was loaded with {axis}={size}: {reason}")
    if getattr(config, "dp_replicate_size", 1) > 1:
        register_layers(lora_config, {nn.Linear: _linear_layer})


def average_copies(model: PeftModel) -> PeftModel:
    """Makes what all ranks train the same in all of them, and lets every backward pass average its gradients.

    Call it once in every process, before the optimizer is made, in a training loop of your own; Trainer does it.
    With gradient accumulation it is right after every micro-batch, and under accelerate's `accumulate` done after the
    last one alone.

    Returns:
        `model`.
    """
    for parameter in model.parameters():
        if not parameter.requires_grad or is_dtensor(parameter):
            continue
        with torch.no_grad():
            distributed.broadcast(parameter, src=0)
        parameter.register_post_accumulate_grad_hook(_average)
    return model


def save_adapter(model: PeftModel, folder: str | os.PathLike, adapter_name: str = "default", **options: Any) -> None:
    """Saves an adapter as one process would have, by the first rank; every process calls it.

    `PeftModel.save_pretrained`, which Trainer's checkpoints use, writes the same and gathers the base model in every
    process before. This gathers the adapter, one tensor after the other.

    Args:
        model: with the adapter; was loaded with a `distributed_config` or without.
        folder: as for `PeftModel.save_pretrained`.
        adapter_name: of the adapter.
        **options: as for `PeftModel.save_pretrained`.
    """
    state = {}
    is_first = not distributed.is_initialized() or distributed.get_rank() == 0
    for name, tensor in model.state_dict().items():
        if f".{adapter_name}." not in name and not name.endswith(f".{adapter_name}"):
            continue
        whole = tensor.full_tensor() if is_dtensor(tensor) else tensor
        if is_first:
            state[name] = whole.cpu()
    if is_first:
        model.save_pretrained(folder, selected_adapters=[adapter_name], state_dict=state, **options)
        inner = "" if adapter_name == "default" else adapter_name
        if distributed.is_initialized():
            _name_published_class(Path(folder) / inner / "adapter_config.json", type(model.get_base_model()))
    if distributed.is_initialized():
        distributed.barrier()


def _name_published_class(config: Path, model_class: type[nn.Module]) -> None:
    """FSDP puts a class of its own in a model's place, and PEFT writes down that for the one to load."""
    from torch.distributed.fsdp import FSDPModule  # imported where processes are several

    fields = json.loads(config.read_text(encoding="utf-8"))
    if fields.get("auto_mapping"):
        published = next(each for each in model_class.__mro__ if not issubclass(each, FSDPModule))
        mapping = {"base_model_class": published.__name__, "parent_library": published.__module__}
        fields["auto_mapping"] |= mapping
        config.write_text(json.dumps(fields, indent=2, sort_keys=True), encoding="utf-8")


def _linear_layer(
    module: nn.Module, adapter_name: str, config: LoraConfig, parameter_name: str | None = None, **options: Any
) -> Linear | None:
    """None leaves the module to PEFT."""
    layer = module.get_base_layer() if isinstance(module, lora.LoraLayer) else module
    if parameter_name is not None or not is_dtensor(layer.weight):
        return None
    return Linear(module, adapter_name, config, **options)


def _average(parameter: nn.Parameter) -> None:
    if GradientState().sync_gradients:
        distributed.all_reduce(parameter.grad, op=distributed.ReduceOp.AVG)
