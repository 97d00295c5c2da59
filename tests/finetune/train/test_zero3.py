"""DeepSpeed's ZeRO-3 in two processes on CPUs, where DeepSpeed is installed."""

import pytest

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
from compared_runs import BEST, MTP, Runs

pytestmark = pytest.mark.slow
ZERO = {"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}}
ZERO |= dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("runs"))
    zero = {"training.deepspeed": ZERO, **BEST}
    for kind in ("lora", "full"):
        runs.add(f"one {kind}", 1, kind == "full", **MTP, **BEST)
        runs.add(f"zero {kind}", 2, kind == "full", **MTP, **zero)
    runs.add("stopped lora", 2, stop=3, **MTP, **zero)
    runs.add("gone on lora", 2, of="stopped lora", **MTP, **zero)
    runs.add("saved again lora", 2, of="stopped lora", lost=["summary.json", "adapter"], **MTP, **zero)
    return runs.go()


@pytest.mark.parametrize("kind, bound", [("lora", 1e-4), ("full", 1e-5)])
def test_zero_3_trains_and_saves_what_one_process_does(runs, kind, bound):
    runs.check_alike(f"zero {kind}", f"one {kind}")
    assert runs.difference(f"zero {kind}", f"one {kind}") < bound


def test_a_stopped_run_goes_on_with_the_same_bits(runs):
    assert runs.found["gone on lora"][0]["resumed_from"] == "checkpoint-2"
    assert runs.found["saved again lora"][0]["resumed_from"] == "checkpoint-6"
    assert runs.difference("gone on lora", "zero lora") == 0
