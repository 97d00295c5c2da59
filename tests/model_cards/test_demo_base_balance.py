"""The comparison of ways to balance experts, on made-up training logs."""

import json

import pytest
from compare_balance import compare
from pretrain import read_recipe

from modeling_deepseek_moe import DeepseekMoeConfig


def run_folder(path, balance: str, loss: float):
    """A run of 40 steps whose measures are `loss` plus a hundredth of the step."""
    path.mkdir()
    history = [{"step": step, "max_violation": loss + step / 100} for step in range(5, 45, 5)]
    history += [{"step": step, "eval_loss": loss + step / 100, "eval_max_violation": 0.5} for step in (10, 20, 30, 40)]
    log = {"balance": balance, "seed": 7, "history": history}
    (path / "training_log.json").write_text(json.dumps(log))
    (path / "experts.json").write_text(json.dumps({"layers": [1, 2], "tokens": [[1, 2, 3], [4, 0, 1]]}))
    return path


def test_the_table_has_a_row_for_each_measure_and_run_and_a_column_for_each_quarter(tmp_path):
    runs = [run_folder(tmp_path / name, name, loss) for name, loss in (("none", 1.0), ("bias", 2.0))]
    lines = compare(runs, tmp_path / "out").splitlines()
    assert lines[0] == "| measure | run | step 10 | step 20 | step 30 | step 40 |"
    assert lines[2] == "| validation loss (nats a token) | none | 1.100 | 1.200 | 1.300 | 1.400 |"
    assert lines[3].endswith("and sequence loss, alpha 0.0001 (V3) | 2.100 | 2.200 | 2.300 | 2.400 |")
    # A batch's MaxVio is noisy: the mean of the logs since the evaluation before.
    assert lines[4].endswith("| none | 1.075 | 1.175 | 1.275 | 1.375 |")
    assert len(lines) == 2 + 3 * 2
    for name in ("balance.png", "balance_experts.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    numbers = json.loads((tmp_path / "out" / "balance.json").read_text())
    assert numbers["seed"] == 7 and numbers["runs"]["none"]["eval_loss"][0] == [10, 1.1]


@pytest.mark.parametrize("balance", ["none", "loss", "weak_loss", "bias"])
def test_every_way_to_balance_is_a_possible_model(balance):
    recipe = read_recipe(balance)
    way = dict(recipe["balances"][recipe["balance"]])
    assert (way.pop("bias_update_speed") > 0) == (balance == "bias")
    config = DeepseekMoeConfig(**recipe["model"], **way)
    assert config.uses_sequence_loss == (balance in ("bias", "none"))
    assert bool(config.aux_loss_alpha) == (balance != "none")
