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

from modeling_deepseek_moe import DeepseekMoeModel
from modeling_deepseek_moe.balancing import load_entropy, max_violation, unused_share

from ..files import write_text
from ..model.balance import BalanceExperts
from ..model.counting import LoadCounter
from .plots import expert_map

_STATISTICS = {"load_entropy": load_entropy, "max_violation": max_violation, "unused_experts": unused_share}
_TITLES = {"load_entropy": "load entropy", "max_violation": "MaxVio", "unused_experts": "unused"}
_TITLES["bias_range"] = "bias range"
_TABLE = "experts.json"


def watch_experts(trainer: Trainer, folder: Path | None = None) -> "WatchExperts":
    """Watches the experts of a Trainer's model; call it before `trainer.train()`.

    It looks at the counts of the Trainer's `BalanceExperts`, if there is one, and counts itself else.

    Each log of the Trainer gets the means, over the MoE layers that ran and the steps since the last one, of
    `load_entropy` (1 is even), `max_violation` (0 is even), `unused_experts` (a share), `bias_range` (if the routers
    have a bias), `aux_loss` and `mtp_loss`; `aux_loss` also where the Trainer computes its loss itself and prints it
    without that. Each evaluation up to the end of training gets the first three with `eval_` in front, over all its
    tokens. What `report_to` names gets the first four of every layer too, as `experts/layer_3/load_entropy`. At the
    end of the run the folder gets `experts.png`, share of the tokens by layer and expert, and `experts.json`; a
    resumed run's are of all its steps.

    Args:
        trainer: its model has MoE blocks.
        folder: gets picture and table; the Trainer's `output_dir` by default.

    Raises:
        ValueError: the model has no MoE block.
    """
    handler = trainer.callback_handler
    balance = next((other for other in handler.callbacks if isinstance(other, BalanceExperts)), None)
    callback = WatchExperts(trainer.model, folder or Path(trainer.args.output_dir), balance)
    # Before the callbacks that report what the Trainer logs.
    handler.callbacks.insert(0, callback)
    reporting = tuple(get_reporting_integration_callbacks(trainer.args.report_to))
    callback.reporters = [other for other in handler.callbacks if isinstance(other, reporting)]
    return callback


class WatchExperts(TrainerCallback):
    """The callback behind `watch_experts`, which says what it logs and writes.

    Args:
        model: the model in training, with or without adapters.
        folder: gets `experts.png` and `experts.json`.
        balance: whose counts to look at, if the same Trainer has it.

    Attributes:
        reporters: callbacks that get the numbers of every layer.
        rows: one for each log: its `step` and, by name, the numbers of the layers, None for one that did not run.
    """

    def __init__(self, model: nn.Module, folder: Path, balance: BalanceExperts | None = None):
        self.folder = folder
        self.reporters: list[TrainerCallback] = []
        self.counter, self._counts_itself = (LoadCounter(model), True) if balance is None else (balance.counter, False)
        if balance is not None:
            balance.watchers.append(self._keep_counts)
        self.layers = list(self.counter.blocks)
        self.rows: list[dict[str, Any]] = []
        self._total: torch.Tensor | None = None
        self._steps: list[torch.Tensor] = []
        self._losses: dict[str, list[torch.Tensor]] = {}
        self._step_losses: dict[str, list[torch.Tensor]] = {}
        self._losses_are_shares = False
        self._base_loss: torch.Tensor | None = None
        self._loss_hooks: list[torch.utils.hooks.RemovableHandle] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        self._unhook()  # a run before may have been interrupted
        if self._counts_itself:
            self.counter.attach(model)  # the Trainer may have wrapped or replaced it
        base = next(module for module in model.modules() if isinstance(module, DeepseekMoeModel))
        self._loss_hooks = [
            model.register_forward_hook(self._keep_losses, with_kwargs=True),
            base.register_forward_hook(self._keep_base_loss),
        ]
        self.rows, self._total = [], None
        for kept in (self._steps, self._losses, self._step_losses):
            kept.clear()
        saved = _checkpoint(args, state) / _TABLE
        if state.global_step and saved.is_file():
            table = json.loads(saved.read_text(encoding="utf-8"))
            self.rows, self._total = table["history"], torch.tensor(table["tokens"])
            unlogged, device = table.get("unlogged", {"steps": [], "losses": {}}), model.device
            self._steps += [torch.tensor(step, dtype=torch.float32).to(device) for step in _numbers(unlogged["steps"])]
            self._losses |= {name: list(torch.tensor(v, device=device)) for name, v in unlogged["losses"].items()}

    def _keep_base_loss(self, base: nn.Module, args: tuple, output: Any) -> None:
        self._base_loss = None if output.aux_loss is None else output.aux_loss.detach()

    def _keep_losses(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        labels, items = kwargs.get("labels"), kwargs.get("num_items_in_batch")
        base_loss, self._base_loss = self._base_loss, None
        if not (model.training and torch.is_grad_enabled()):
            return
        aux_loss, mtp_loss = (getattr(output, name, None) for name in ("aux_loss", "mtp_loss"))
        if labels is None or not hasattr(output, "mtp_loss"):  # the model does not compute the loss
            aux_loss, items = base_loss, None
        self._losses_are_shares = items is not None
        if aux_loss is not None:
            # As in the model's loss; `mtp_loss` is this call's share already.
            share = 1 if items is None else (labels[:, 1:] != -100).sum() / items
            self._step_losses.setdefault("aux_loss", []).append(aux_loss.detach().float() * share)
        if mtp_loss is not None:
            self._step_losses.setdefault("mtp_loss", []).append(mtp_loss.detach().float())

    def _keep_counts(self, counts: torch.Tensor) -> None:
        self._total = counts if self._total is None else self._total.to(counts.device) + counts
        self._steps.append(_statistics(counts))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._counts_itself:
            self._keep_counts(self.counter.take())
        for name, parts in self._step_losses.items():
            parts = torch.stack(parts)
            self._losses.setdefault(name, []).append(parts.sum() if self._losses_are_shares else parts.mean())
        self._step_losses.clear()
        # What ran between two steps, of sampling for instance, is not of the next evaluation.
        self.counter.drop(training=False)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        # Only logs that all processes write: what is added takes their communication.
        if "loss" in logs or "train_runtime" in logs:
            mean = self._training_means(args, state, control)
        elif prefix := next((name.removesuffix("_runtime") for name in logs if name.endswith("_runtime")), None):
            mean = _means(dict(zip(_STATISTICS, _statistics(self.counter.take(training=False)), strict=True)))
            mean = {f"{prefix}_{name}": value for name, value in mean.items()}
        else:
            return
        logs.update(mean)
        state.log_history[-1].update(mean)

    def on_predict(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.counter.drop(training=False)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        losses = {name: _mean_of_processes(torch.stack(values)).tolist() for name, values in self._losses.items()}
        if state.is_world_process_zero and (folder := _checkpoint(args, state)).is_dir():
            # What the next log would have said of these steps.
            self._write_table(folder, unlogged={"steps": _nulls(self._steps), "losses": losses})

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._unhook()
        if self._total is None or not state.is_world_process_zero:
            return
        share = self._total / self._total.sum(dim=1, keepdim=True).clamp_min(1)
        self.folder.mkdir(parents=True, exist_ok=True)
        expert_map({"share of the tokens served in training": share}, self.layers, self.folder / "experts.png")
        self._write_table(self.folder)
        if self.rows:
            self._print_table()

    def _unhook(self) -> None:
        if self._counts_itself:
            self.counter.remove()
        for hook in self._loss_hooks:
            hook.remove()
        self._loss_hooks.clear()

    def _training_means(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> dict:
        """Means since the last log, which are also reported and kept layer by layer."""
        if not self._steps:
            return {}
        loads = dict(zip(_STATISTICS, torch.stack(self._steps).nanmean(dim=0).cpu(), strict=True))
        self._steps.clear()
        biases = [getattr(router, "e_score_correction_bias", None) for router in self.counter.routers.values()]
        if all(bias is not None for bias in biases):
            ranges = torch.stack([(bias.amax() - bias.amin()).cpu() for bias in biases])
            loads["bias_range"] = ranges.masked_fill(loads["load_entropy"].isnan(), math.nan)
        row = {name: [None if math.isnan(value) else value for value in loads[name].tolist()] for name in loads}
        self.rows.append({"step": state.global_step, **row})
        logs = {
            f"experts/layer_{layer}/{name}": value
            for name, values in row.items()
            for layer, value in zip(self.layers, values, strict=True)
            if value is not None
        }
        for reporter in self.reporters:
            reporter.on_log(args, state, control, logs=logs)
        return _means(loads) | self._mean_losses(args)

    def _mean_losses(self, args: TrainingArguments) -> dict[str, float]:
        """Losses since the last log, mean of steps and processes."""
        if not self._losses:
            return {}
        means = torch.stack([torch.stack(values).mean() for values in self._losses.values()])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(means)
            if not (self._losses_are_shares and args.average_tokens_across_devices):
                means /= torch.distributed.get_world_size()
        names = list(self._losses)
        self._losses.clear()
        return dict(zip(names, means.tolist(), strict=True))

    def _write_table(self, folder: Path, **more: Any) -> None:
        table = {"layers": self.layers, "tokens": self._total.tolist(), "history": self.rows, **more}
        write_text(folder / _TABLE, json.dumps(table, allow_nan=False) + "\n")

    def _print_table(self) -> None:
        first, last = self.rows[0], self.rows[-1]
        table = Table(title=f"Experts, from step {first['step']} to {last['step']}")
        names = [name for name in _TITLES if name in last]
        for column in ("layer", *(_TITLES[name] for name in names)):
            table.add_column(column, justify="right")
        for index, layer in enumerate(self.layers):
            if first["load_entropy"][index] is not None and last["load_entropy"][index] is not None:
                spans = (f"{first[name][index]:.3f} to {last[name][index]:.3f}" for name in names)
                table.add_row(str(layer), *spans)
        Console().print(table)


def _mean_of_processes(values: torch.Tensor) -> torch.Tensor:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
        values /= torch.distributed.get_world_size()
    return values


def _nulls(steps: list[torch.Tensor]) -> list[list[list[float | None]]]:
    """Statistics of steps for JSON, which has no word for what is not a number."""
    return [[[None if math.isnan(value) else value for value in row] for row in step.tolist()] for step in steps]


def _numbers(steps: list[list[list[float | None]]]) -> list[list[list[float]]]:
    """What `_nulls` was made of."""
    return [[[math.nan if value is None else value for value in row] for row in step] for step in steps]


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _statistics(counts: torch.Tensor) -> torch.Tensor:
    """`_STATISTICS` `[3, layers]` of counts `[layers, E]`; not a number for a layer that did not run."""
    statistics = torch.stack([statistic(counts) for statistic in _STATISTICS.values()])
    return statistics.masked_fill(counts.sum(dim=-1) == 0, math.nan)


def _means(loads: dict[str, torch.Tensor]) -> dict[str, float]:
    """Means over the layers that ran, nothing if none did."""
    means = {name: values.nanmean().item() for name, values in loads.items()}
    return {name: mean for name, mean in means.items() if not math.isnan(mean)}
