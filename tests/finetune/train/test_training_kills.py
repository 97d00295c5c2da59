"""A run that is killed at any moment, as often as you like, ends as if nothing had happened: bit for bit."""

import itertools
import random
import shutil
import signal
import time

import pytest
from kills import STOPPED
from left_by_runs import assert_same, what_it_left
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


def kill_often(folder, base, kills: int, seed: int, sigterm: bool = False) -> None:
    """Kill runs at random moments until `kills` were hit, or by SIGTERM; every run that survives is compared."""
    # By default SIGTERM ends a process that has not begun to listen.
    endings = (signal.SIGTERM, 256 * STOPPED) if sigterm else (signal.SIGALRM,)
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
                moment = 1.2 * moments.random() * seconds[kind] if hit < kills else None
                ending = program.run(recipes[kind], moment, sigterm)
                assert ending in (0, *endings), f"the run failed after {hit} kills"
                hit += ending != 0
                done = ending == 0
            finished += 1
            assert_same(what_it_left(run), expected[kind])
            if hit >= kills:
                break
    assert hit >= kills and finished


def test_five_kills_change_nothing(tmp_path, base):
    kill_often(tmp_path, base, kills=5, seed=0)


@pytest.mark.slow
def test_a_hundred_kills_change_nothing(tmp_path, base):
    kill_often(tmp_path, base, kills=100, seed=1)


@pytest.mark.slow
def test_thirty_times_sigterm_changes_nothing(tmp_path, base):
    kill_often(tmp_path, base, kills=30, seed=2, sigterm=True)
