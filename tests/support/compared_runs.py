"""Runs of recipes in one and in several processes on one base, and the bounds by which they are alike."""

import json
from pathlib import Path

import pytest
import torch
from rank_runs import run_jobs
from safetensors.torch import load_file
from tiny_run import counting_rows, full, tiny_base, tiny_values, write_jsonl

FSDP = {"training.fsdp": True}
BEST = {"training.load_best_model_at_end": True, "training.eval_strategy": "steps", "training.eval_steps": 2}
MTP = {"losses.mtp_loss_weight": 0.3, "losses.aux_loss_alpha": 0.1}


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    files = [*run.glob("adapter/*.safetensors"), *run.glob("model/*.safetensors")]
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


class Runs:
    """Jobs of `run_jobs` on one base, and what they left."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.base = tiny_base(folder / "base", "v3")
        self.held_out = write_jsonl(folder / "held_out.jsonl", counting_rows("prompt", 9))
        self.jobs, self.found = {}, {}

    def add(self, name: str, ranks: int, trains_all: bool = False, of: str | None = None, **options) -> None:
        """`of`: another run, in whose folder this one goes on; `stop`, `lost`: as in `run_jobs`."""
        told = {key: options.pop(key) for key in ("stop", "lost") if key in options}
        folder = self.folder / (of or name)
        folder.mkdir(exist_ok=True)
        defaults = {"training.per_device_train_batch_size": 12 // ranks, "eval_data": str(self.held_out)}
        defaults |= {"training.learning_rate": 1e-4 if trains_all else 1e-3, "eval_fraction": 0.0}
        values = tiny_values(folder, self.base, **{**defaults, **options})
        values = {key: value for key, value in values.items() if value is not None}
        self.jobs[name] = {"ranks": ranks, "values": full(values) if trains_all else values, **told}

    def go(self) -> "Runs":
        self.found = run_jobs(self.folder / "jobs", self.jobs)
        return self

    def run(self, name: str) -> Path:
        return Path(self.jobs[name]["values"]["output_dir"])

    def log(self, name: str, key: str) -> list[float]:
        log = json.loads((self.run(name) / "trainer_state.json").read_text("utf-8"))["log_history"]
        return [row[key] for row in log if key in row]

    def difference(self, name: str, other: str) -> float:
        """The largest one between the saved weights, which have the same names and shapes."""
        ours, theirs = (weights_of(self.run(each)) for each in (name, other))
        assert ours.keys() == theirs.keys()
        assert all(ours[key].shape == theirs[key].shape for key in ours)
        return max(float((ours[key].float() - theirs[key].float()).abs().max()) for key in ours)

    def check_alike(self, name: str, other: str) -> None:
        """The rows `loss, every layout`, `gradient norm` and `held-out loss` of the bounds."""
        for rank in self.found[name]:
            assert rank.keys() == self.found[other][0].keys()
            for key in ("eval_loss_before", "eval_loss_after"):
                assert rank[key] == pytest.approx(self.found[other][0][key], rel=1e-6), key
        for key, bound in (("loss", 1e-6), ("grad_norm", 1e-5), ("eval_loss", 1e-6)):
            assert self.log(name, key) == pytest.approx(self.log(other, key), rel=bound), key
