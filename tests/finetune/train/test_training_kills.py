"""A run that is killed at any moment, as often as you like, ends as if nothing had happened: bit for bit."""

import itertools
import json
import random
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import tiny_values
from training_kills import KilledTraining

# Everything that a step can depend on: dropout's random numbers, warm-up and decay of the learning rate, gradient
# accumulation over a ragged epoch, moving selection biases, and the best checkpoint so far.
SETTINGS = {
    "bias_update_speed": 0.01,
    "training.max_steps": 12,
    "training.per_device_train_batch_size": 2,
    "training.gradient_accumulation_steps": 2,
    "training.lr_scheduler_type": "cosine",
    "training.warmup_steps": 3,
    "training.eval_strategy": "steps",
    "training.eval_steps": 2,
    "training.load_best_model_at_end": True,
}
KINDS = {
    "adapters": {"lora.targets": ["attention"], "lora.lora_dropout": 0.2, "merge": True},
    "whole model": {"lora.targets": []},
}


def kill_often(folder, base, kills: int, seed: int) -> None:
    """Kill runs at random moments until `kills` were hit; every run that survives is compared."""
    moments = random.Random(seed)
    with KilledTraining() as program:
        recipes, expected, seconds = {}, {}, {}
        for kind, settings in KINDS.items():
            (folder / kind).mkdir()
            values = tiny_values(folder / kind, base, **SETTINGS, **settings)
            values = {key: value for key, value in values.items() if value != []}
            if kind == "whole model":
                values = {key: value for key, value in values.items() if not key.startswith("lora.")}
            begun = time.monotonic()
            assert program.run(values) == 0, "it fails without being killed"
            recipes[kind], seconds[kind] = values, time.monotonic() - begun
            expected[kind] = what_it_left(folder / kind / "run")
        hit, finished = 0, 0
        for kind in itertools.cycle(KINDS):
            run = folder / kind / "run"
            shutil.rmtree(run)
            done = False
            while not done:
                # Sometimes long enough to come through, or the end of a run would never be hit.
                signal = program.run(recipes[kind], 1.2 * moments.random() * seconds[kind] if hit < kills else None)
                assert signal in (0, 14), f"the run failed after {hit} kills"
                hit += signal != 0
                done = signal == 0
            finished += 1
            assert_same(what_it_left(run), expected[kind])
            if hit >= kills:
                break
    assert hit >= kills and finished


def what_it_left(run):
    """Weights, and the numbers of the summary and the log that are no times."""
    weights = {
        f"{path.parent.name}/{path.name}/{name}": tensor
        for path in sorted([*run.glob("adapter/*.safetensors"), *run.glob("model/*.safetensors")])
        for name, tensor in load_file(path).items()
    }
    state = json.loads((run / "trainer_state.json").read_text())
    summary = json.loads((run / "summary.json").read_text())
    numbers = {key: summary[key] for key in ("steps", "train_loss", "eval_loss_before", "eval_loss_after")}
    numbers |= {key: state[key] for key in ("best_metric", "best_global_step", "best_model_checkpoint", "epoch")}
    log = [
        {key: value for key, value in row.items() if "_per_second" not in key and "time" not in key}
        for row in state["log_history"]
        if "train_loss" not in row
    ]
    return weights, numbers, log, json.loads((run / "experts.json").read_text())


def assert_same(one, other):
    assert one[0].keys() == other[0].keys() and one[0]
    assert all(torch.equal(one[0][name], other[0][name]) for name in one[0])
    assert one[1:] == other[1:]


def test_five_kills_change_nothing(tmp_path, base):
    kill_often(tmp_path, base, kills=5, seed=0)


@pytest.mark.slow
def test_a_hundred_kills_change_nothing(tmp_path, base):
    kill_often(tmp_path, base, kills=100, seed=1)
