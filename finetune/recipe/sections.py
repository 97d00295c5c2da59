"""The sections of a recipe and what may stand in each: fields of other libraries' classes, by their own names."""

import dataclasses
import typing
from collections.abc import Collection
from typing import Any

from modeling_deepseek_moe.distribution import install

from ..errors import RecipeError
from .schema import EsftOptions, ParallelOptions

SECTIONS = ("lora", "esft", "parallel", "dpo", "losses", "training")
# Fields of `DeepseekMoeConfig` that only training reads: type, and a line about each.
LOSSES = {
    "aux_loss_alpha": ("float", "Weight of the expert-level balance loss; 0 for none."),
    "aux_loss_type": ("str", "Which balance loss that is: expert (V1, V2), sequence (V3), or auto, by the router."),
    "seq_aux": ("bool", "Count the balance losses of V1 and V2 per sequence instead of per batch."),
    "device_loss_alpha": ("float", "Weight of the balance between groups of experts (V1, V2)."),
    "communication_loss_alpha": ("float", "Weight of the balance of what groups of experts receive (V2)."),
    "balance_devices": ("int", "How many groups of experts those two losses balance; by default the router's own."),
    "aux_loss_counts_padding": ("bool", "Count padding in balance losses, as DeepSeek's own code does."),
    "mtp_loss_weight": ("float", "Weight of the multi-token prediction loss; 0 keeps its layers frozen."),
}
# What keys are called elsewhere, without their section.
ALSO_CALLED = {
    "lr": "training.learning_rate",
    "batch_size": "training.per_device_train_batch_size",
    "epochs": "training.num_train_epochs",
    "wd": "training.weight_decay",
    "warmup": "training.warmup_steps",
    "scheduler": "training.lr_scheduler_type",
    "optimizer": "training.optim",
    "rank": "lora.r",
    "alpha": "lora.lora_alpha",
    "dropout": "lora.lora_dropout",
    "target_modules": "lora.targets",
    "seq_len": "max_length",
    "cutoff_len": "max_length",
    "load_in_4bit": "quantization",
    "output": "output_dir",
    "dataset": "data",
}
# What runs set where a recipe says nothing and the library's default is another.
DEFAULTS: dict[str, dict[str, Any]] = {
    "training": {
        "logging_steps": 10,
        "save_total_limit": 2,
        "report_to": "none",
        "eval_strategy": "no",
        "logging_nan_inf_filter": False,  # a loss that is no number ends the run, so it need not be hidden
        "include_num_input_tokens_seen": "non_padding",  # the log and the loss curve count tokens
    },
    "lora": {"r": 16, "lora_alpha": 32},
    "dpo": {"precompute_ref_log_probs": True},  # false with `quantization`
}
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
_AS_IN_YAML |= {"gradient_accumulation_steps": int | None}  # a shipped recipe's goes where `global_batch_size` comes
# Fields of `LoraConfig` that the targets decide, or the method.
_NOT_OF_LORA = {"target_modules", "target_parameters", "task_type", "peft_type"}
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


def is_key(section: str, name: str) -> bool:
    """Whether a field of a section's class may stand in a recipe; `section` is "" for the recipe's own."""
    if section == "training":
        return not name.startswith(("hub_", "do_", "_")) and name not in OWN_INSTEAD
    return name not in {"lora": _NOT_OF_LORA, "dpo": _NOT_OF_DPO}.get(section, ())


def section_hints(used: Collection[str]) -> dict[str, dict[str, Any]]:
    """Section -> key -> type. Sections whose library is slow to import are read only where `used` names them."""
    hints = {"lora": _lora_hints(), "losses": _losses_hints()}
    hints |= {"esft": typing.get_type_hints(EsftOptions), "parallel": typing.get_type_hints(ParallelOptions)}
    return hints | {"dpo": _dpo_hints() if "dpo" in used else {}, "training": _training_hints()}


def _lora_hints() -> dict[str, Any]:
    from peft import LoraConfig

    hints = typing.get_type_hints(LoraConfig)
    hints["init_lora_weights"] = bool | str  # PEFT's choices have a placeholder among them; `check_lora` knows them
    return {"targets": list[str]} | {
        item.name: hints[item.name]
        for item in dataclasses.fields(LoraConfig)
        if item.init and is_key("lora", item.name)
    }


def _losses_hints() -> dict[str, Any]:
    from modeling_deepseek_moe import DeepseekMoeConfig

    hints = {name: DeepseekMoeConfig.__annotations__[name] for name in LOSSES}
    return {name: float if hint == float | int else hint for name, hint in hints.items()}


def _training_hints() -> dict[str, Any]:
    from transformers import TrainingArguments

    hints = typing.get_type_hints(TrainingArguments) | _AS_IN_YAML
    return {
        item.name: hints[item.name]
        for item in dataclasses.fields(TrainingArguments)
        if item.init and is_key("training", item.name)
    }


def _dpo_hints() -> dict[str, Any]:
    try:
        from trl import DPOConfig
    except ImportError as error:
        raise RecipeError(f"the `dpo` keys need TRL: {install('trl')}") from error
    from transformers import TrainingArguments

    hints = typing.get_type_hints(DPOConfig)
    hints["pad_to_multiple_of"] = int | None  # TRL takes text for it, too, and makes that a number later
    others = {item.name for item in dataclasses.fields(TrainingArguments)}
    return {
        item.name: hints[item.name]
        for item in dataclasses.fields(DPOConfig)
        if item.init and item.name not in others and is_key("dpo", item.name)
    }
