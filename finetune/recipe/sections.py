"""The sections of a recipe and what may stand in each: fields of other libraries' classes, by their own names."""

import dataclasses
import typing
from collections.abc import Collection
from typing import Any

from modeling_deepseek_moe.distribution import install

from ..errors import RecipeError
from .schema import EsftOptions

SECTIONS = ("lora", "esft", "dpo", "losses", "training")
# Fields of `DeepseekMoeConfig` that only training reads.
_LOSSES = (
    "aux_loss_alpha",
    "aux_loss_type",
    "seq_aux",
    "device_loss_alpha",
    "communication_loss_alpha",
    "balance_devices",
    "aux_loss_counts_padding",
    "mtp_loss_weight",
)
OWN_INSTEAD = {
    "output_dir": "set `output_dir`",
    "seed": "set `seed`",
    "gradient_checkpointing": "set `gradient_checkpointing`",
    "activation_checkpointing": "set `gradient_checkpointing`",
    "push_to_hub": "set `hub_id`",
    "hub_model_id": "set `hub_id`",
    "hub_private_repo": "set `hub_private`",
    "hub_token": "tokens do not belong in a recipe: run `hf auth login`",
    "label_smoothing_factor": "the Trainer would replace the model's losses by one of its own, on unshifted labels",
    "resume_from_checkpoint": "the same recipe run again resumes by itself",
}
# `TrainingArguments` take more than they say (`fsdp: true`), or an object that a mapping of its fields makes.
_AS_IN_YAML = {"fsdp": bool | str | None, "parallelism_config": dict | None}
# Fields of `DPOConfig` that this package decides itself, or that have no effect here.
_NOT_OF_DPO = {
    "max_length",
    "truncation_mode",
    "model_init_kwargs",
    "trust_remote_code",
    "dataset_num_proc",
    "router_aux_loss_coef",
    "padding_free",
    "pad_token",
}


def section_hints(used: Collection[str]) -> dict[str, dict[str, Any]]:
    """Section -> key -> type. Sections whose library is slow to import are read only where `used` names them."""
    hints = {"lora": _lora_hints(), "esft": typing.get_type_hints(EsftOptions), "losses": _losses_hints()}
    return hints | {"dpo": _dpo_hints() if "dpo" in used else {}, "training": _training_hints()}


def _lora_hints() -> dict[str, Any]:
    from peft import LoraConfig

    ours = {"target_modules", "target_parameters", "task_type", "peft_type"}
    hints = typing.get_type_hints(LoraConfig)
    hints["init_lora_weights"] = bool | str  # PEFT's choices have a placeholder among them; `check_lora` knows them
    return {"targets": list[str]} | {
        item.name: hints[item.name] for item in dataclasses.fields(LoraConfig) if item.init and item.name not in ours
    }


def _losses_hints() -> dict[str, Any]:
    from modeling_deepseek_moe import DeepseekMoeConfig

    hints = {name: DeepseekMoeConfig.__annotations__[name] for name in _LOSSES}
    return {name: float if hint == float | int else hint for name, hint in hints.items()}


def _training_hints() -> dict[str, Any]:
    from transformers import TrainingArguments

    hints = typing.get_type_hints(TrainingArguments) | _AS_IN_YAML
    return {
        item.name: hints[item.name]
        for item in dataclasses.fields(TrainingArguments)
        if item.init and not item.name.startswith(("hub_", "do_")) and item.name not in OWN_INSTEAD
    }


def _dpo_hints() -> dict[str, Any]:
    try:
        from trl import DPOConfig
    except ImportError as error:
        raise RecipeError(f"the `dpo` keys need TRL: {install('trl')}") from error
    from transformers import TrainingArguments

    hints = typing.get_type_hints(DPOConfig)
    hints["pad_to_multiple_of"] = int | None  # TRL takes text for it, too, and makes that a number later
    others = {item.name for item in dataclasses.fields(TrainingArguments)} | _NOT_OF_DPO
    return {
        item.name: hints[item.name] for item in dataclasses.fields(DPOConfig) if item.init and item.name not in others
    }
