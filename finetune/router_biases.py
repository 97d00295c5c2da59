"""The routers' selection biases of a PEFT run: its checkpoints hold adapters only, and the biases move."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .model.counting import blocks_of, router_of
from .runs.folder import aside

_FILE, _KEY = "router_biases.safetensors", "layers.{}.mlp.gate.e_score_correction_bias"


class KeepRouterBiases(TrainerCallback):
    """Saves the biases in every checkpoint, and takes them from the one that a run goes on from or ends with."""

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            biases = {
                _KEY.format(i): router_of(block).e_score_correction_bias for i, block in blocks_of(model).items()
            }
            with aside(Path(args.output_dir) / f"checkpoint-{state.global_step}" / _FILE) as path:
                save_file({name: bias.cpu().contiguous() for name, bias in biases.items()}, path)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        if state.global_step:
            restore_router_biases(model, Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint:
            restore_router_biases(model, Path(state.best_model_checkpoint))


@torch.no_grad()
def restore_router_biases(model: nn.Module, checkpoint: Path) -> None:
    """Sets the biases to those of the checkpoint, if it has any apart from the model's weights."""
    if (checkpoint / _FILE).is_file():
        biases = load_file(checkpoint / _FILE)
        for layer, block in blocks_of(model).items():
            router_of(block).e_score_correction_bias.copy_(biases[_KEY.format(layer)])
