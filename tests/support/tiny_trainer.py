"""A tiny V3 model in training under transformers' Trainer, and what tests of experts' balance look at."""

import torch
from tiny import tiny_ids, tiny_model, v3_config
from transformers import Trainer, TrainingArguments

LAYERS = [1, 2, 3]


def training_model(**overrides):
    """Layers 1 and 2 with experts, and 3, the MTP module; every loss is a visible part of the sum.

    Biases are too small to decide alone: which experts are busy differs from batch to batch.
    """
    fields = {"mtp_loss_weight": 0.3, "aux_loss_alpha": 0.5, "pad_token_id": 0, **overrides}
    model = tiny_model(v3_config(**fields)).train()
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer *= 0.1
    return model


def biases(model) -> torch.Tensor:
    """`[layers, E]`, a copy."""
    found = [buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
    return torch.stack(found).clone()


def whole_rows(model, count: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Rows of 10 tokens."""
    return [{"input_ids": ids, "labels": ids} for ids in tiny_ids(model.config, count, 10, seed)]


def padded_rows(model, count: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Rows of 4 to 10 tokens, padded to 10, their first two without a target."""
    rows = []
    for number, ids in enumerate(tiny_ids(model.config, count, 10, seed)):
        mask = (torch.arange(10) < 4 + 5 * number % 7).long()
        learned = mask.bool() & (torch.arange(10) >= 2)
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(~learned, -100)})
    return rows


def batch_of(rows) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def counts_by_hand(model, rows) -> list[list[int]]:
    """Tokens an expert in every MoE layer that padded rows run, from the routers' output, in the model's mode."""
    found = {}

    def keep(layer):
        return lambda gate, args, output: found.update({layer: output[2]})

    gates = {layer: model.model.layers[layer].mlp.gate for layer in LAYERS}
    handles = [gate.register_forward_hook(keep(layer)) for layer, gate in gates.items()]
    batch = batch_of(rows)
    model(**batch)
    for handle in handles:
        handle.remove()
    mask = batch["attention_mask"].bool()
    # The MTP module counts positions whose next token is there.
    counted = {1: mask, 2: mask, 3: mask[:, :-1] & mask[:, 1:]}
    return [
        torch.bincount(ids[counted[layer].flatten()].flatten(), minlength=8).tolist() for layer, ids in found.items()
    ]


def trainer_of(model, rows, folder, callbacks=(), trainer_class=Trainer, **options) -> Trainer:
    """Two rows a micro-batch, in the order of `rows`; a log at every step; nothing saved."""
    defaults = {"report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "optim": "sgd"}
    defaults |= {"per_device_train_batch_size": 2, "train_sampling_strategy": "sequential", "learning_rate": 0.1}
    data = {name: options.pop(name) for name in ("eval_dataset", "data_collator") if name in options}
    arguments = TrainingArguments(output_dir=str(folder), **{**defaults, "logging_steps": 1, **options})
    return trainer_class(model=model, args=arguments, train_dataset=rows, callbacks=list(callbacks), **data)
