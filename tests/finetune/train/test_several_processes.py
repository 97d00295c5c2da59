"""Runs in several processes (gloo, float32): the losses, norms and files of one process, whatever the layout.

Bounds are of sums in another order: two to three times what was seen.
"""

import pytest
import torch
from compared_runs import BEST, FSDP, MTP, Runs, weights_of


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("quick"))
    runs.add("one", 1, **{"training.max_steps": 2})
    runs.add("fsdp", 2, **FSDP, **{"training.max_steps": 2})
    return runs.go()


def test_fsdp_trains_and_saves_what_one_process_does(quick):
    quick.check_alike("fsdp", "one")
    assert quick.difference("fsdp", "one") < 1e-4


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("runs"))
    for name, ranks, options in (
        ("one", 1, {}),
        ("ddp", 2, {}),
        ("ddp3", 3, {}),
        ("fsdp", 2, FSDP),
        ("fsdp4", 4, FSDP),
    ):
        runs.add(f"{name} lora", ranks, **MTP, **BEST, **options)
        runs.add(f"{name} full", ranks, trains_all=True, bias_update_speed=0.01, **MTP, **BEST, **options)
    for name, ranks, options in (("one", 1, {}), ("fsdp", 2, FSDP)):
        runs.add(f"{name} untrained", ranks, **options, **{"training.learning_rate": 0.0})
    runs.add("fsdp measured by nobody", 2, **MTP, **FSDP, eval_data=None)
    for trains_all in (False, True):
        kind = "full" if trains_all else "lora"
        options = {**MTP, **BEST, **FSDP, **({"bias_update_speed": 0.01} if trains_all else {})}
        runs.add(f"stopped {kind}", 2, trains_all, stop=3, **options)
        runs.add(f"gone on {kind}", 2, trains_all, of=f"stopped {kind}", **options)
    for kind, options in (("lora", {}), ("full", {"trains_all": True, "bias_update_speed": 0.01})):
        lost = ["summary.json", "adapter", "model"]
        runs.add(f"saved again {kind}", 4, of=f"fsdp4 {kind}", lost=lost, **MTP, **BEST, **FSDP, **options)
    return runs.go()


LAYOUTS = ("ddp", "ddp3", "fsdp", "fsdp4")


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_loss_gradient_norm_and_held_out_loss_are_those_of_one_process(runs, layout, kind):
    runs.check_alike(f"{layout} {kind}", f"one {kind}")


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_adapter_after_six_steps_is_that_of_one_process(runs, layout):
    assert runs.difference(f"{layout} lora", "one lora") < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_whole_model_after_six_steps_is_that_of_one_process_by_every_name(runs, layout):
    """The copies that multi-token prediction has of embedding and head are among the names."""
    assert any(name.endswith("shared_head.head.weight") for name in weights_of(runs.run("one full")))
    assert runs.difference(f"{layout} full", "one full") < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_selection_biases_are_equal(runs, layout):
    ours, theirs = (weights_of(runs.run(f"{name} full")) for name in (layout, "one"))
    biases = [name for name in theirs if name.endswith("e_score_correction_bias")]
    assert biases and all(torch.equal(ours[name], theirs[name]) for name in biases)


@pytest.mark.slow
def test_an_adapter_saved_without_training_is_bit_equal(runs):
    assert runs.difference("fsdp untrained", "one untrained") == 0


@pytest.mark.slow
def test_training_is_the_same_whether_the_model_was_evaluated_first_or_not(runs):
    """To the bit: nothing is added up in another order."""
    for key in ("loss", "grad_norm"):
        assert runs.log("fsdp measured by nobody", key) == runs.log("fsdp lora", key)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_stopped_run_goes_on_with_the_same_bits_in_as_many_processes(runs, kind):
    assert runs.found[f"gone on {kind}"][0]["resumed_from"] == "checkpoint-2"
    assert runs.difference(f"gone on {kind}", f"fsdp {kind}") == 0
    for key in ("loss", "grad_norm", "eval_loss"):
        assert runs.log(f"gone on {kind}", key) == runs.log(f"fsdp {kind}", key)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_run_whose_results_were_lost_saves_its_best_checkpoint_again(runs, kind):
    again, before = (runs.found[f"{name} {kind}"][0] for name in ("saved again", "fsdp4"))
    assert again["resumed_from"] == "checkpoint-6" and before["resumed_from"] is None
    assert again["eval_loss_after"] == before["eval_loss_after"]
