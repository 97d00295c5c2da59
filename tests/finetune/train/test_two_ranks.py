"""Two processes with half of the batch each against one with all of it: same biases, same numbers about experts.

The processes are started once; each trains in a plain loop under DDP, with the Trainer, and by a recipe.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from places import SUPPORT
from tiny_run import tiny_base, tiny_values
from tiny_trainer import batch_of, biases, padded_rows, trainer_of, training_model
from torch.nn.parallel import DistributedDataParallel

from modeling_deepseek_moe.finetune.experts.watch import watch_experts
from modeling_deepseek_moe.finetune.model.balance import BalanceExperts
from modeling_deepseek_moe.finetune.recipe.load import make_recipe
from modeling_deepseek_moe.finetune.train import one_run as train

SPEED = 0.01
WATCHED = ["load_entropy", "max_violation", "unused_experts", "bias_range", "aux_loss", "mtp_loss"]


def plain_loop(rank: int, ranks: int, rule: str) -> torch.Tensor:
    """Two optimizer steps of two micro-batches of four rows, of which a rank takes its share.

    The weights stay, so that only the biases change.
    """
    model = training_model()
    wrapped = DistributedDataParallel(model) if torch.distributed.is_initialized() else model
    balancer = BalanceExperts(wrapped, SPEED, rule)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    rows = padded_rows(model, 16)
    for start in (0, 8):
        for micro_batch in (start, start + 4):
            part = rows[micro_batch : micro_batch + 4][rank::ranks]
            wrapped(**batch_of(part)).loss.backward()
        optimizer.step()
        balancer.step()
        optimizer.zero_grad()
    return biases(model)


def trainer_run(folder, ranks: int) -> dict:
    """The same steps, and training, by the Trainer; it deals the rows out in turn."""
    model = training_model()
    rows = padded_rows(model, 16)
    options = {"per_device_train_batch_size": 4 // ranks, "gradient_accumulation_steps": 2, "max_steps": 2}
    options |= {"per_device_eval_batch_size": 4 // ranks, "eval_strategy": "steps", "eval_steps": 2}
    balancer = BalanceExperts(model, SPEED)
    trainer = trainer_of(model, rows, folder, [balancer], eval_dataset=rows, learning_rate=0.01, **options)
    watcher = watch_experts(trainer)
    trainer.train()
    if ranks > 1:
        torch.distributed.barrier()
    table = json.loads((folder / "experts.json").read_text())
    return {"biases": biases(model), "history": trainer.state.log_history, "rows": watcher.rows, "table": table}


def recipe_run(folder, rank: int, ranks: int) -> list[dict[str, float]]:
    """Losses and gradient norms of a recipe whose held-out rows are measured before the first step."""
    values = [None]
    if rank == 0:
        options = {"training.use_cpu": True, "training.max_steps": 3, "eval_fraction": 0.25}
        options["training.per_device_train_batch_size"] = 6 // ranks
        values = [tiny_values(folder, tiny_base(folder / "base"), **options)]
    if ranks > 1:
        torch.distributed.broadcast_object_list(values)
    train.run(make_recipe(values[0]))
    if ranks > 1:
        torch.distributed.barrier()  # the main process writes
    log = json.loads((folder / "run" / "trainer_state.json").read_text())["log_history"]
    return [{name: row[name] for name in ("loss", "grad_norm")} for row in log if "loss" in row]


def run_all(folder, rank: int, ranks: int) -> None:
    found = {rule: plain_loop(rank, ranks, rule) for rule in ("sign", "proportional")}
    found |= {"trainer": trainer_run(folder, ranks), "recipe": recipe_run(folder, rank, ranks)}
    torch.save(found, folder / f"{rank}.pt")


def one_of_two(rank: int, folder) -> None:
    torch.set_num_threads(1)
    os.environ |= {name: str(rank) for name in ("RANK", "LOCAL_RANK")} | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    run_all(folder, rank, 2)
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """Results of the single process, of rank 0 and of rank 1."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    environment = {**os.environ, "PYTHONPATH": str(SUPPORT)}
    subprocess.run([sys.executable, __file__, str(two)], check=True, timeout=300, env=environment)
    run_all(one, 0, 1)
    return [torch.load(path) for path in (one / "0.pt", two / "0.pt", two / "1.pt")]


@pytest.mark.parametrize("rule", ["sign", "proportional"])
def test_t28_two_ranks_end_with_the_biases_of_one_in_a_plain_loop(found, rule):
    single, *both = (result[rule] for result in found)
    # The same counts, the same operations.
    assert all(torch.equal(rank, single) for rank in both)
    assert not torch.equal(plain_loop(0, 2, rule), single), "half of the batch alone says something else"


def test_t28_two_ranks_end_with_the_biases_of_one_under_the_trainer(found):
    single, *both = (result["trainer"]["biases"] for result in found)
    assert all(torch.equal(rank, single) for rank in both)
    assert not torch.equal(single, biases(training_model()))


def test_both_ranks_log_the_numbers_of_the_whole_batch(found):
    """Losses are sums of float32 in another order."""
    single, *both = (result["trainer"]["history"] for result in found)
    for rank in both:
        assert len(rank) == len(single) == 4
        for ours, theirs in zip(single, rank, strict=True):
            names = [name for name in ours if name.removeprefix("eval_") in WATCHED]
            assert len(names) == (6 if "loss" in ours else 3 if "eval_loss" in ours else 0)
            for name in names:
                assert theirs[name] == pytest.approx(ours[name], rel=1e-5), name
    rows, *others = (result["trainer"]["rows"] for result in found)
    assert others == [rows, rows]


def test_the_table_at_the_end_counts_the_tokens_of_all_ranks(found):
    tables = [result["trainer"]["table"] for result in found]
    assert tables[0] == tables[1] == tables[2]
    # Two steps, all tokens of 16 rows, 3 experts each, in the layers of the main model.
    tokens = sum(int(row["attention_mask"].sum()) for row in padded_rows(training_model(), 16))
    assert [sum(layer) for layer in tables[0]["tokens"][:2]] == [3 * tokens] * 2


def test_a_run_that_is_measured_first_still_averages_the_gradients_of_all_ranks(found):
    single, *both = (result["recipe"] for result in found)
    assert len(single) == 3
    for rank in both:
        for ours, theirs in zip(single, rank, strict=True):
            assert theirs == pytest.approx(ours, rel=1e-4)  # sums of float32 in another order


if __name__ == "__main__":
    # Forked where that is safe, from a process that has computed nothing yet: importing is what takes the time.
    method = "fork" if sys.platform == "linux" else "spawn"
    torch.multiprocessing.start_processes(one_of_two, args=(Path(sys.argv[1]),), nprocs=2, start_method=method)
