"""Which experts a run uses: numbers while it trains, a heat map and a table at its end."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from modeling_deepseek_moe.balancing import load_entropy, max_violation, unused_share

from .load_counter import LoadCounter
from .plots import expert_map
from .run_folder import write_text


def watch_experts(trainer: Trainer, folder: Path | None = None) -> "WatchExperts":
    """Watches the experts of a Trainer's model; call it before `trainer.train()`.

    Each log of the Trainer gets the mean of all MoE layers since the last one: `load_entropy` (1 is even),
    `max_violation` (0 is even), `unused_experts` (a share), `bias_range`, `aux_loss` and `mtp_loss`; each evaluation
    the first three with `eval_` in front, counted over all its tokens. What `report_to` names gets the first four of
    every layer too, as `experts/layer_3/load_entropy`. At the end of the run the folder gets `experts.png`, share of
    the tokens by layer and expert, and `experts.json`.

    Args:
        trainer: its model has MoE blocks.
        folder: where picture and table go; the Trainer's `output_dir` by default.
    """
    callback = WatchExperts(trainer.model, folder or Path(trainer.args.output_dir))
    # Before the callbacks that report what the Trainer logs.
    handler = trainer.callback_handler
    handler.callbacks.insert(0, callback)
    reporting = tuple(get_reporting_integration_callbacks(trainer.args.report_to))
    callback.reporters = [other for other in handler.callbacks if isinstance(other, reporting)]
    return callback


class WatchExperts(TrainerCallback):
    """The callback behind `watch_experts`, which says what it logs and writes.

    Args:
        model: the model in training, with or without adapters.
        folder: for `experts.png` and `experts.json`.
    """

    def __init__(self, model: nn.Module, folder: Path):
        self.folder = folder
        self.reporters: list[TrainerCallback] = []
        self.in_training, self.in_evaluation = LoadCounter(model), LoadCounter(model, training=False)
        self.layers = list(self.in_training.blocks)
        self.rows: list[dict[str, Any]] = []
        self._total: torch.Tensor | None = None
        self._steps: list[torch.Tensor] = []
        self._losses: dict[str, list[torch.Tensor]] = {}
        self._step_losses: dict[str, list[tuple[torch.Tensor, bool]]] = {}
        model.register_forward_hook(self._keep_losses, with_kwargs=True)

    def _keep_losses(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if not model.training:
            return
        for name in ("aux_loss", "mtp_loss"):
            if getattr(output, name, None) is not None:
                # `mtp_loss` is this call's share where the number of targets of the whole batch is given.
                is_share = name == "mtp_loss" and kwargs.get("num_items_in_batch") is not None
                self._step_losses.setdefault(name, []).append((getattr(output, name).detach().float(), is_share))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        counts = self.in_training.take()
        self._total = counts if self._total is None else self._total + counts
        self._steps.append(counts)
        for name, parts in self._step_losses.items():
            value = torch.stack([value for value, _ in parts]).sum()
            is_share = all(is_share for _, is_share in parts)
            self._losses.setdefault(name, []).append(value if is_share else value / len(parts))
        self._step_losses.clear()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        if any(name.startswith("eval_") for name in logs):
            mean = {f"eval_{name}": value for name, value in _means(_loads([self.in_evaluation.take()])).items()}
        elif self._steps:
            loads = _loads(self._steps)
            loads["bias_range"] = self._bias_ranges()
            mean = _means(loads) | self._mean_losses(args)
            self._steps.clear()
            row = {"step": state.global_step}
            row |= {name: [None if value != value else value for value in loads[name].tolist()] for name in loads}
            self.rows.append(row)
            self._report(args, state, control, row)
        else:
            return
        logs.update(mean)
        state.log_history[-1].update(mean)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._total is None or not state.is_world_process_zero:
            return
        share = self._total / self._total.sum(dim=1, keepdim=True).clamp_min(1)
        self.folder.mkdir(parents=True, exist_ok=True)
        expert_map({"share of the tokens served in training": share}, self.layers, self.folder / "experts.png")
        table = {"layers": self.layers, "tokens": self._total.tolist(), "history": self.rows}
        write_text(self.folder / "experts.json", json.dumps(table) + "\n")
        if self.rows:
            self._print_table(state)

    def _bias_ranges(self) -> torch.Tensor:
        gates = [block.gate for block in self.in_training.blocks.values()]
        biases = [getattr(gate, "e_score_correction_bias", torch.zeros(1)) for gate in gates]
        return torch.stack([(bias.amax() - bias.amin()).cpu() for bias in biases])

    def _mean_losses(self, args: TrainingArguments) -> dict[str, float]:
        """Losses since the last log, mean of steps and processes."""
        means = {}
        for name, values in self._losses.items():
            value = torch.stack(values).mean()
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(value)
                is_split = name == "mtp_loss" and args.average_tokens_across_devices
                value = value if is_split else value / torch.distributed.get_world_size()
            means[name] = round(value.item(), 6)
        self._losses.clear()
        return means

    def _report(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, row: dict[str, Any]
    ) -> None:
        logs = {
            f"experts/layer_{layer}/{name}": values[index]
            for index, layer in enumerate(self.layers)
            for name, values in row.items()
            if name != "step" and values[index] is not None
        }
        for reporter in self.reporters:
            reporter.on_log(args, state, control, logs=logs)

    def _print_table(self, state: TrainerState) -> None:
        first, last = self.rows[0], self.rows[-1]
        table = Table(title=f"Experts, from step {first['step']} to {last['step']}")
        names = {
            "load_entropy": "load entropy",
            "max_violation": "MaxVio",
            "unused_experts": "unused",
            "bias_range": "bias range",
        }
        for column in ("layer", *names.values()):
            table.add_column(column, justify="right")
        for index, layer in enumerate(self.layers):
            if last["load_entropy"][index] is not None:
                spans = (f"{first[name][index]:.3f} to {last[name][index]:.3f}" for name in names)
                table.add_row(str(layer), *spans)
        Console().print(table)


def _loads(steps: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Statistics `[layers]` of counts `[layers, E]`, the mean over steps; not a number for a layer that did not run."""
    counts = torch.stack(steps).cpu()
    ran = counts.sum(dim=(0, 2)) > 0
    statistics = {"load_entropy": load_entropy, "max_violation": max_violation, "unused_experts": unused_share}
    return {
        name: statistic(counts).mean(dim=0).masked_fill(~ran, math.nan) for name, statistic in statistics.items()
    }


def _means(loads: dict[str, torch.Tensor]) -> dict[str, float]:
    """Means over the layers that ran."""
    return {name: round(values.nanmean().item(), 6) for name, values in loads.items()}
