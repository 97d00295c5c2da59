"""What a run leaves, to compare it with another one to the bit."""

import json

import torch
from safetensors.torch import load_file


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
