"""Watching experts: what a run logs, reports and writes, against numbers computed by hand."""

import contextlib
import io
import json
import math
import struct
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import pytest
import torch
from peft import get_peft_model
from tensorboardX.proto.event_pb2 import Event
from tiny import tiny_ids, tiny_model, v1_config
from tiny_trainer import LAYERS, batch_of, biases, counts_by_hand, padded_rows, trainer_of, training_model
from transformers import Trainer, TrainerCallback, TrainerState

from modeling_deepseek_moe.finetune.experts.watch import watch_experts
from modeling_deepseek_moe.finetune.model.balance import BalanceExperts
from modeling_deepseek_moe.finetune.model.counting import LoadCounter
from modeling_deepseek_moe.finetune.model.lora import known_warnings, lora_config

STATISTICS = ["load_entropy", "max_violation", "unused_experts"]
SPEED = 0.05
# The same counts in float32, summed in another order.
RELATIVE = 1e-5


def by_hand(counts: list[int]) -> dict[str, float]:
    mean, total = sum(counts) / len(counts), sum(counts)
    entropy = -sum(count / total * math.log(count / total) for count in counts if count)
    return {
        "load_entropy": entropy / math.log(len(counts)),
        "max_violation": max(counts) / mean - 1,
        "unused_experts": counts.count(0) / len(counts),
    }


def mean_by_hand(steps: list[list[list[int]]]) -> dict[str, list[float]]:
    """By name, of every layer, the mean over steps."""
    numbers = [[by_hand(counts) for counts in step] for step in steps]
    layers = range(len(numbers[0]))
    return {name: [sum(step[i][name] for step in numbers) / len(steps) for i in layers] for name in STATISTICS}


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    """Steps and values by name, from TensorBoard's event file: length, its checksum, an event, its checksum."""
    (path,) = folder.rglob("events.out.tfevents.*")
    data, found = path.read_bytes(), {}
    while data:
        length = struct.unpack("<Q", data[:8])[0]
        event, data = Event.FromString(data[12 : 12 + length]), data[16 + length :]
        for value in event.summary.value:
            if value.HasField("simple_value"):
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def strict(path):
    def refuse(constant):
        raise ValueError(f"{path.name} holds {constant}")

    return json.loads(path.read_text(), parse_constant=refuse)


class RememberRanges(TrainerCallback):
    """The range of each layer's bias at every log."""

    def __init__(self, model):
        self.model, self.ranges = model, []

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            now = biases(self.model)
            self.ranges.append((now.amax(dim=1) - now.amin(dim=1)).tolist())


def watched(model, rows, folder, callbacks=(), **options):
    """Trainer and watcher of a run with four rows a step, in which only the bias can move."""
    options = {"gradient_accumulation_steps": 2, "learning_rate": 0.0, **options}
    trainer = trainer_of(model, rows, folder, callbacks, **options)
    return trainer, watch_experts(trainer)


class Run(NamedTuple):
    folder: Path
    trainer: Trainer
    printed: str
    steps: list  # counts by hand of every step and layer
    evaluated: list  # and of the evaluation's layers
    means: list[dict[str, list[float]]]  # of every log, by name, of every layer


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """Four steps, a log every two, an evaluation at the end; the bias moves."""
    folder, model = tmp_path_factory.mktemp("run"), training_model()
    rows, eval_rows = padded_rows(model, 16), padded_rows(model, 6, seed=1)
    # A twin is balanced beside it: the routing of a step depends on the biases after the one before.
    twin, steps = training_model(), []
    balancer = BalanceExperts(twin, SPEED)
    for start in range(0, 16, 4):
        steps.append(counts_by_hand(twin, rows[start : start + 4]))
        balancer.step()
    means = [mean_by_hand(steps[:2]), mean_by_hand(steps[2:])]

    ranges = RememberRanges(model)
    options = {"max_steps": 4, "logging_steps": 2, "report_to": ["tensorboard"], "disable_tqdm": False}
    options |= {"eval_dataset": eval_rows, "eval_strategy": "steps", "eval_steps": 4}
    trainer, _ = watched(model, rows, folder, [BalanceExperts(model, SPEED), ranges], **options)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        trainer.train()
    for numbers, values in zip(means, ranges.ranges, strict=True):
        numbers["bias_range"] = values
    return Run(folder, trainer, printed.getvalue(), steps, counts_by_hand(twin.eval(), eval_rows), means)


def test_every_layers_numbers_are_reported(run):
    reported = scalars(run.folder)
    for index, layer in enumerate(LAYERS):
        for name in run.means[0]:
            steps, values = zip(*reported[f"train/experts/layer_{layer}/{name}"], strict=True)
            assert steps == (2, 4)
            assert values == pytest.approx([numbers[name][index] for numbers in run.means], rel=RELATIVE)
    assert len([name for name in reported if "layer_" in name]) == 3 * 4


def test_the_log_has_the_means_of_all_layers_as_what_is_reported_beside_it(run):
    logged = [row for row in run.trainer.state.log_history if "loss" in row]
    reported = scalars(run.folder)
    for place, (row, numbers) in enumerate(zip(logged, run.means, strict=True)):
        for name, values in numbers.items():
            assert row[name] == pytest.approx(mean(values), rel=RELATIVE)
            assert reported[f"train/{name}"][place] == (row["step"], pytest.approx(row[name]))
        assert row["aux_loss"] > 0.1 and row["mtp_loss"] > 0.1
        assert not any("layer" in name for name in row)


def test_an_evaluations_numbers_are_of_all_its_tokens(run):
    (row,) = (row for row in run.trainer.state.log_history if "eval_loss" in row)
    reported = scalars(run.folder)
    for name, values in mean_by_hand([run.evaluated]).items():
        assert row[f"eval_{name}"] == pytest.approx(mean(values), rel=RELATIVE)
        assert reported[f"eval/{name}"] == [(4, pytest.approx(mean(values), rel=RELATIVE))]


def test_the_console_shows_means_and_at_the_end_a_table_of_layers(run):
    lines, table = run.printed.split("Experts, from step 2 to 4")
    assert "'max_violation'" in lines and "layer" not in lines
    assert all(title in table for title in ("load entropy", "MaxVio", "unused", "bias range"))
    for index in range(3):
        for name in run.means[0]:
            first, last = (numbers[name][index] for numbers in run.means)
            assert f"{first:.3f} to {last:.3f}" in table


def test_the_folder_gets_the_numbers_in_strict_json_and_a_picture(run):
    saved = strict(run.folder / "experts.json")
    assert saved["layers"] == LAYERS
    assert torch.equal(torch.tensor(saved["tokens"]), torch.tensor(run.steps).sum(dim=0))
    assert [row["step"] for row in saved["history"]] == [2, 4]
    for row, numbers in zip(saved["history"], run.means, strict=True):
        for name, values in numbers.items():
            assert row[name] == pytest.approx(values, rel=RELATIVE)
    assert (run.folder / "experts.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("accumulation", [1, 4], ids=["4 rows at once", "4 times 1 row"])
def test_logged_losses_are_those_of_the_whole_batch_however_it_is_cut(accumulation, tmp_path):
    """Rows have different numbers of targets. Two logs, each the mean of two steps."""
    model = training_model()
    rows = padded_rows(model, 16)
    options = {"per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}
    trainer, _ = watched(model, rows, tmp_path, max_steps=4, logging_steps=2, **options)
    trainer.train()
    steps = []
    for start in range(0, 16, 4):
        batch = batch_of(rows[start : start + 4])
        steps.append(model.train()(**batch, num_items_in_batch=(batch["labels"][:, 1:] != -100).sum()))
    for row, pair in zip(trainer.state.log_history, (steps[:2], steps[2:]), strict=False):
        for name in ("loss", "aux_loss", "mtp_loss"):
            assert row[name] == pytest.approx(mean(outputs[name].item() for outputs in pair), rel=RELATIVE)


def test_losses_that_no_coefficient_weighs_are_not_logged_nor_layers_that_do_not_run(tmp_path):
    model = training_model(mtp_loss_weight=0.0, aux_loss_alpha=0.0)
    trainer, watcher = watched(model, padded_rows(model, 4), tmp_path, max_steps=1)
    trainer.train()
    row = trainer.state.log_history[0]
    assert "mtp_loss" not in row and "aux_loss" not in row
    for name, values in watcher.rows[0].items():
        if name != "step":
            assert values[2] is None and row[name] == pytest.approx(mean(values[:2]))
    assert strict(tmp_path / "experts.json")["history"][0]["bias_range"][2] is None


@pytest.mark.filterwarnings("ignore:mtp_loss_weight=0.3 has no part in this training")
def test_a_loss_that_the_trainer_computes_is_logged_with_the_balance_loss_that_is_attached_to_it(tmp_path):
    model = training_model()
    rows = padded_rows(model, 4)
    trainer, _ = watched(model, rows, tmp_path, max_steps=1, label_smoothing_factor=0.1)
    trainer.train()
    row = trainer.state.log_history[0]
    batches = [batch_of(rows[start : start + 2]) for start in (0, 2)]
    attached = [model.model(b["input_ids"], attention_mask=b["attention_mask"]).aux_loss for b in batches]
    assert row["aux_loss"] == pytest.approx(mean(loss.item() for loss in attached), rel=RELATIVE)
    assert row["load_entropy"] > 0 and "mtp_loss" not in row


def test_a_model_without_a_bias_has_no_bias_range(tmp_path, capsys):
    model = tiny_model(v1_config(pad_token_id=0)).train()
    trainer, watcher = watched(model, padded_rows(model, 4), tmp_path, max_steps=1)
    trainer.train()
    assert set(watcher.rows[0]) == {"step", *STATISTICS}
    assert "bias_range" not in trainer.state.log_history[0]
    assert "bias range" not in capsys.readouterr().out


def test_a_run_too_short_for_a_log_has_its_picture_and_table(tmp_path, capsys):
    model = training_model()
    folder = tmp_path / "pictures" / "of experts"
    options = {"gradient_accumulation_steps": 2, "max_steps": 2, "logging_steps": 50}
    trainer = trainer_of(model, padded_rows(model, 8), tmp_path, **options)
    watch_experts(trainer, folder)
    trainer.train()
    assert "load_entropy" in trainer.state.log_history[-1], "with the summary at the end"
    assert (folder / "experts.png").is_file() and len(strict(folder / "experts.json")["history"]) == 1
    assert "Experts, from step 2 to 2" in capsys.readouterr().out
    assert not list(tmp_path.glob("experts.*"))


def test_each_evaluation_set_has_its_own_numbers_and_nothing_else_counts(tmp_path):
    model = training_model()
    sets = {"one": padded_rows(model, 4, seed=1), "other": padded_rows(model, 4, seed=2)}

    class Sample(TrainerCallback):
        """Runs the model in evaluation mode between steps."""

        def on_step_begin(self, args, state, control, model, **kwargs):
            model.eval()(tiny_ids(model.config, batch=50))
            model.train()

    options = {"eval_dataset": sets, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
    trainer, _ = watched(model, padded_rows(model, 8), tmp_path, [Sample()], **options)
    trainer.predict(padded_rows(model, 4, seed=3))
    before = trainer.evaluate(sets["one"])
    trainer.train()
    for name, rows in sets.items():
        expected = mean_by_hand([counts_by_hand(model.eval(), rows)])
        found = [row for row in trainer.state.log_history if f"eval_{name}_loss" in row]
        assert len(found) == 2
        for row in found:
            for statistic, values in expected.items():
                assert row[f"eval_{name}_{statistic}"] == pytest.approx(mean(values), rel=RELATIVE)
                if name == "one":
                    assert before[f"eval_{statistic}"] == pytest.approx(mean(values), rel=RELATIVE)


def test_another_callbacks_log_gets_nothing_and_takes_nothing(tmp_path):
    model = training_model()

    class Log(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            trainer.log({"eval_of_mine": 1.0})

    trainer, _ = watched(model, padded_rows(model, 8), tmp_path, [Log()], max_steps=2, logging_steps=2)
    trainer.train()
    mine = [row for row in trainer.state.log_history if "eval_of_mine" in row]
    assert [set(row) for row in mine] == [{"eval_of_mine", "epoch", "step"}] * 2
    (row,) = (row for row in trainer.state.log_history if "loss" in row)
    steps = [counts_by_hand(model.train(), padded_rows(model, 8)[start : start + 4]) for start in (0, 4)]
    assert row["max_violation"] == pytest.approx(mean(mean_by_hand(steps)["max_violation"]), rel=RELATIVE)


def test_a_resumed_run_shows_all_of_its_steps(tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    tables = []
    for checkpoint in (None, str(tmp_path / "checkpoint-2")):
        model = training_model()
        trainer, _ = watched(model, padded_rows(model, 16), tmp_path, [BalanceExperts(model, SPEED)], **options)
        trainer.train(resume_from_checkpoint=checkpoint)
        tables.append(strict(tmp_path / "experts.json"))
    assert tables[0] == tables[1]
    assert [row["step"] for row in tables[1]["history"]] == [1, 2, 3, 4]
    state = tmp_path / "checkpoint-4" / "trainer_state.json"
    assert "load_entropy" in TrainerState.load_from_json(str(state)).log_history[0] and strict(state)


def test_training_leaves_no_hook_and_a_second_run_starts_from_zero(tmp_path):
    model = training_model()
    rows = padded_rows(model, 4)

    class BreakOnce(TrainerCallback):
        def on_substep_end(self, *args, **kwargs):
            trainer.remove_callback(self)
            raise KeyboardInterrupt

    trainer, watcher = watched(model, rows, tmp_path, [BreakOnce()], max_steps=1)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    found = []
    for _ in range(2):
        trainer.train()
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        found.append((strict(tmp_path / "experts.json"), trainer.state.log_history[0]["aux_loss"]))
    assert found[0] == found[1]
    assert found[0][0]["tokens"] == counts_by_hand(model, rows) and len(watcher.rows) == 1
    batch = batch_of(rows)
    aux_loss = model(**batch, num_items_in_batch=(batch["labels"][:, 1:] != -100).sum()).aux_loss
    assert found[0][1] == pytest.approx(aux_loss.item(), rel=RELATIVE)
    assert not any(name in trainer.evaluate(rows) for name in ("eval_load_entropy", "eval_max_violation"))


def test_a_model_with_adapters_everywhere_is_watched(tmp_path):
    model = training_model()
    rows = padded_rows(model, 4)
    expected = mean_by_hand([counts_by_hand(model, rows)])
    with known_warnings():
        adapted = get_peft_model(model, lora_config(model, ["all"], r=2))
    trainer, _ = watched(adapted, rows, tmp_path, max_steps=1)
    trainer.train()
    row = trainer.state.log_history[0]
    for name, values in expected.items():
        assert row[name] == pytest.approx(mean(values), rel=RELATIVE)
    assert row["aux_loss"] > 0 and row["mtp_loss"] > 0 and row["bias_range"] > 0


def test_a_model_without_experts_is_refused(tmp_path):
    model = tiny_model(v1_config(n_routed_experts=None, num_experts_per_tok=None, pad_token_id=0))
    trainer = trainer_of(model, padded_rows(model, 4), tmp_path, max_steps=1)
    with pytest.raises(ValueError, match="DeepseekMoeForCausalLM has no `layers` with a DeepseekMoeBlock"):
        watch_experts(trainer)


def test_the_bias_step_and_the_watcher_share_one_count_that_is_taken_once_a_step(tmp_path, monkeypatch):
    model, taken = training_model(), []
    real = LoadCounter.take
    monkeypatch.setattr(
        LoadCounter, "take", lambda counter, *a, **k: taken.append(real(counter, *a, **k)) or taken[-1]
    )

    class Look(TrainerCallback):
        def on_substep_end(self, *args, **kwargs):
            assert len(model.model.expert_counts) == 1

    balancer = BalanceExperts(model, SPEED)
    trainer, watcher = watched(model, padded_rows(model, 12), tmp_path, [Look(), balancer], max_steps=3)
    trainer.train()
    assert len(taken) == 3 and all(counts.sum() > 0 for counts in taken)
    assert strict(tmp_path / "experts.json")["tokens"] == sum(taken).tolist()
    assert watcher.counter is balancer.counter and not model.model.expert_counts


@pytest.mark.slow
def test_a_compiled_model_is_balanced_and_watched_as_an_eager_one(tmp_path):
    """Both runs on, one after the other."""
    found = []
    for compiled in (False, True):
        model = training_model()
        options = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if compiled else {}
        balancer = BalanceExperts(model, SPEED)
        trainer, _ = watched(model, padded_rows(model, 8), tmp_path, [balancer], max_steps=2, **options)
        trainer.train()
        tables = [strict(tmp_path / "experts.json")]
        trainer.train()
        tables += [strict(tmp_path / "experts.json")]
        found.append((tables, trainer.state.log_history))
    (eager, eager_log), (compiled, compiled_log) = found
    assert eager == compiled
    for one, other in zip(eager_log[:2], compiled_log[:2], strict=True):
        for name in (*STATISTICS, "aux_loss", "mtp_loss", "bias_range"):
            assert other[name] == pytest.approx(one[name], rel=RELATIVE)
