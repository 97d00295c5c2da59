"""Runs whose model is spread by transformers' `DistributedConfig` (gloo, float32): what one process does.

Bounds are of sums in another order: two to three times what was seen.
"""

import json

import pytest
import torch
import transformers
from compared_runs import BEST, MTP, Runs, weights_of
from packaging.version import Version

pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.24.0"), reason="transformers spreads models rightly from 5.24 on"
)

EP = {"parallel.ep": 2}
BATCH = {"global_batch_size": 12}
BIAS = {"bias_update_speed": 0.01, "watch": True}
ROWS = "training.per_device_train_batch_size"
LAYOUTS = {
    "shard 2": (2, {"parallel.shard": "auto"}),
    "shard 2 ep 2": (2, EP),
    "tp 2": (2, {"parallel.tp": 2, ROWS: 12}),
    "tp 2 ep 2": (2, {"parallel.tp": 2, "parallel.ep": 2, ROWS: 12}),
    "shard 4 ep 2": (4, EP),
    "shard 2 replicate 2 ep 2": (4, {"parallel.replicate": 2, **EP}),
    "shard 2 tp 2 ep 4": (4, {"parallel.tp": 2, "parallel.ep": 4, ROWS: 6}),
}
LORA = [name for name, (_, options) in LAYOUTS.items() if "parallel.tp" not in options]


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("quick"))
    steps = {"training.max_steps": 2}
    runs.add("one lora", 1, **MTP, **steps)
    runs.add("ep lora", 2, **MTP, **EP, **steps)
    runs.add("one full", 1, True, **MTP, **BIAS, **steps)
    runs.add("ep full", 2, True, **MTP, **BIAS, **EP, **steps)
    return runs.go()


@pytest.mark.parametrize("kind, bound", [("lora", 1e-4), ("full", 1e-5)])
def test_expert_parallel_runs_train_and_save_what_one_process_does(quick, kind, bound):
    quick.check_alike(f"ep {kind}", f"one {kind}")
    assert quick.difference(f"ep {kind}", f"one {kind}") < bound
    parts = list((quick.run(f"ep {kind}") / "checkpoint-2" / "spread" / "weights").glob("*.safetensors"))
    assert len(parts) == 2


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("runs"))
    for name, (ranks, options) in {"one": (1, {}), **LAYOUTS}.items():
        runs.add(f"{name} full", ranks, True, **MTP, **BEST, **BIAS, **options)
        if name in ("one", *LORA):
            runs.add(f"{name} lora", ranks, **MTP, **BEST, **options)
    runs.add("one untrained", 1, **{"training.learning_rate": 0.0})
    runs.add("ep untrained", 2, **EP, **{"training.learning_rate": 0.0})
    return runs.go()


EVERY = [(name, "full") for name in LAYOUTS] + [(name, "lora") for name in LORA]


@pytest.mark.slow
@pytest.mark.parametrize("layout, kind", EVERY)
def test_loss_gradient_norm_and_held_out_loss_are_those_of_one_process(runs, layout, kind):
    runs.check_alike(f"{layout} {kind}", f"one {kind}")


@pytest.mark.slow
@pytest.mark.parametrize("layout", LORA)
def test_the_adapter_after_six_steps_is_that_of_one_process(runs, layout):
    assert runs.difference(f"{layout} lora", "one lora") < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_whole_model_after_six_steps_is_that_of_one_process_by_every_name(runs, layout):
    assert any(name.endswith("shared_head.head.weight") for name in weights_of(runs.run(f"{layout} full")))
    assert runs.difference(f"{layout} full", "one full") < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_selection_biases_and_what_is_said_of_experts_are_equal(runs, layout):
    ours, theirs = (weights_of(runs.run(f"{name} full")) for name in (layout, "one"))
    biases = [name for name in theirs if name.endswith("e_score_correction_bias")]
    assert biases and all(torch.equal(ours[name], theirs[name]) for name in biases)
    tables = [json.loads((runs.run(f"{name} full") / "experts.json").read_text()) for name in (layout, "one")]
    assert tables[0] == tables[1]


@pytest.mark.slow
def test_an_adapter_saved_without_training_is_bit_equal(runs):
    assert runs.difference("ep untrained", "one untrained") == 0


# Where a run of two processes goes on, whose experts are apart.
OTHER_SIZES = {
    "one": (1, {"parallel.shard": "auto"}),
    "three": (3, {"parallel.shard": 3}),
    "tensor parallel": (2, {"parallel.tp": 2, ROWS: 12}),
}


@pytest.fixture(scope="module")
def resumed(tmp_path_factory) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("resumed"))
    for kind in ("lora", "full"):
        options = {"trains_all": kind == "full", **MTP, **BEST, **BATCH, **(BIAS if kind == "full" else {})}
        runs.add(f"through {kind}", 2, **options, **EP)
        for name, (ranks, layout) in {"two": (2, EP), **OTHER_SIZES}.items():
            if kind == "lora" and "parallel.tp" in layout:
                continue
            runs.add(f"stopped {name} {kind}", 2, stop=3, **options, **EP)
            runs.add(f"{name} {kind}", ranks, of=f"stopped {name} {kind}", **options, **layout)
        lost = ["summary.json", "adapter", "model"]
        runs.add(f"saved again {kind}", 2, of=f"through {kind}", lost=lost, **options, **EP)
    runs.add("stopped other rows", 2, stop=3, **EP)
    runs.add(
        "other rows", 3, of="stopped other rows", **{"parallel.shard": 3, "training.per_device_train_batch_size": 6}
    )
    return runs.go()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_stopped_run_goes_on_with_the_same_bits_in_as_many_processes(resumed, kind):
    assert resumed.found[f"two {kind}"][0]["resumed_from"] == "checkpoint-2"
    assert resumed.difference(f"two {kind}", f"through {kind}") == 0
    for key in ("loss", "grad_norm", "eval_loss"):
        assert resumed.log(f"two {kind}", key) == resumed.log(f"through {kind}", key)


@pytest.mark.slow
@pytest.mark.parametrize(
    "size, kind, bound",
    [*((size, "full", 1e-5) for size in OTHER_SIZES), ("one", "lora", 1e-4), ("three", "lora", 1e-4)],
)
def test_a_stopped_run_goes_on_in_another_layout_as_if_nothing_were(resumed, size, kind, bound):
    assert resumed.found[f"{size} {kind}"][0]["resumed_from"] == "checkpoint-2"
    resumed.check_alike(f"{size} {kind}", f"through {kind}")
    assert resumed.difference(f"{size} {kind}", f"through {kind}") < bound


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_run_whose_results_were_lost_saves_its_best_checkpoint_again(resumed, kind):
    again, before = (resumed.found[f"{name} {kind}"][0] for name in ("saved again", "through"))
    assert again["resumed_from"] == "checkpoint-6" and before["resumed_from"] is None
    assert again["eval_loss_after"] == before["eval_loss_after"]


@pytest.mark.slow
def test_steps_of_another_number_of_rows_are_refused(resumed):
    for found in resumed.found["other rows"]:
        assert "was written by a run with 12 rows a step, and here a step has 18" in found["error"]
