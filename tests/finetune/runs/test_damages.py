"""Files of a run that are missing, cut, changed or empty: it ends with the same bits, or names the file."""

import collections
import json
import shutil
from pathlib import Path

import pytest
import torch
from left_by_runs import assert_same, what_it_left
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from tiny_run import stopped_at, tiny_base, tiny_values

from modeling_deepseek_moe.finetune.errors import UserError
from modeling_deepseek_moe.finetune.recipe.load import make_recipe
from modeling_deepseek_moe.finetune.runs.checkpoints import last_checkpoint
from modeling_deepseek_moe.finetune.runs.seals import COMPLETE, damage, seal
from modeling_deepseek_moe.finetune.train import one_run as train

pytestmark = pytest.mark.usefixtures("metric_cache")

SETTINGS = {
    "lora.targets": ["attention"],
    "lora.lora_dropout": 0.2,
    "bias_update_speed": 0.01,
    "merge": True,
    "metric": "exact_match",
    "metric_rows": 2,
    "training.lr_scheduler_type": "cosine",
}
DAMAGES = {
    "missing": lambda path: path.unlink(),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3]),
    "changed": lambda path: path.write_bytes(flipped(path.read_bytes())),
    "empty": lambda path: path.write_bytes(b""),
}
NEWEST = "checkpoint-4"
OF_A_CHECKPOINT = (
    *("adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"),
    *("trainer_state.json", "experts.json", "router_biases.safetensors", COMPLETE),
)
OF_THE_RUN = ("recipe.yaml", "data.json", "before.json", "metric_before.json", "data/*/*/*/*.arrow", "data/*.json")


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, metric_cache) -> Path:
    """`run` of six steps that was stopped in the sixth, and `whole`, that was not."""
    folder = tmp_path_factory.mktemp("damages")
    values = tiny_values(folder, tiny_base(folder / "base"), **SETTINGS)
    train.run(make_recipe({**values, "output_dir": str(folder / "whole")}))
    with stopped_at(5, "checkpoint-4 is saved"):
        train.run(make_recipe(values))
    return folder


def outcome(folder: Path, copy: Path, name: str, kind: str, capsys) -> str:
    """What a run does whose file is damaged so: "goes on" as if nothing had been, or "named" and refused."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder / "run", copy)
    damaged = next(iter(sorted(copy.glob(name))))
    DAMAGES[kind](damaged)
    values = tiny_values(folder, folder / "base", **SETTINGS, output_dir=str(copy))
    capsys.readouterr()
    try:
        train.run(make_recipe(values))
    except UserError as error:
        assert "\n" not in str(error) and str(copy) in str(error)
        assert damaged.name in str(error) or "its `" in str(error), f"{error} does not name {name}"
        return "named"
    printed = " ".join(capsys.readouterr().out.split())
    assert damaged.name in printed or damaged.parent.name in printed, f"nothing was said of {name}, {kind}"
    assert_same(what_it_left(copy), what_it_left(folder / "whole"))
    summaries = [json.loads((run / "summary.json").read_text()) for run in (copy, folder / "whole")]
    assert summaries[0]["metric_before"] == summaries[1]["metric_before"] is not None
    return "goes on"


@pytest.mark.parametrize(
    "name, kind, expected",
    [
        (f"{NEWEST}/rng_state.pth", "missing", "goes on"),
        (f"{NEWEST}/optimizer.pt", "changed", "goes on"),
        ("before.json", "changed", "goes on"),
        ("data.json", "cut", "named"),
        ("data/*/*/*/*.arrow", "changed", "goes on"),
    ],
)
def test_a_damaged_file_is_named_and_changes_nothing(folder, tmp_path, capsys, name, kind, expected):
    assert outcome(folder, tmp_path / "run", name, kind, capsys) == expected


@pytest.mark.slow
def test_no_damage_changes_a_bit_in_silence(folder, tmp_path, capsys):
    """The table counts what was tried, and how it ended."""
    counts = collections.defaultdict(collections.Counter)
    for name in (*(f"{NEWEST}/{name}" for name in OF_A_CHECKPOINT), *OF_THE_RUN):
        for kind in DAMAGES:
            counts[name][outcome(folder, tmp_path / "run", name, kind, capsys)] += 1
    table = Table("file", "tried", "goes on, said", "refused by name")
    for name, found in counts.items():
        table.add_row(name, str(found.total()), str(found["goes on"]), str(found["named"]))
    with capsys.disabled():
        Console().print(table)
    assert sum(found.total() for found in counts.values()) == 4 * (len(OF_A_CHECKPOINT) + len(OF_THE_RUN))
    # What belongs to a checkpoint never stops the run: there is an older one.
    assert all(not found["named"] for name, found in counts.items() if name.startswith(NEWEST))


def test_where_no_checkpoint_is_whole_nothing_is_begun_anew(folder, tmp_path):
    shutil.copytree(folder / "run", tmp_path / "run")
    for checkpoint in (tmp_path / "run").glob("checkpoint-*"):
        DAMAGES["changed"](checkpoint / "optimizer.pt")
    values = tiny_values(folder, folder / "base", **SETTINGS, output_dir=str(tmp_path / "run"))
    with pytest.raises(UserError, match=r"checkpoint-4 is damaged: optimizer.pt has changed .* no other checkpoint"):
        train.run(make_recipe(values))
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 2
    shutil.copy(folder / "run" / "checkpoint-2" / "optimizer.pt", tmp_path / "run" / "checkpoint-2")
    assert train.run(make_recipe(values))["resumed_from"] == "checkpoint-2"


BEST = {
    "training.load_best_model_at_end": True,
    "training.eval_strategy": "steps",
    "training.eval_steps": 2,
    "training.greater_is_better": True,  # then the first one stays the best
}


@pytest.mark.parametrize("when", ["before the run goes on", "while it trains"])
def test_a_best_checkpoint_that_is_damaged_is_not_taken(tmp_path, base, when):
    recipe = make_recipe(tiny_values(tmp_path, base, **BEST))
    with stopped_at(5, "checkpoint-4 is saved"):
        train.run(recipe)
    weights = tmp_path / "run" / "checkpoint-2" / "adapter_model.safetensors"
    if when == "before the run goes on":
        DAMAGES["changed"](weights)
        message = (
            "checkpoint-4 is damaged: the best one before it, checkpoint-2, is damaged: adapter_model.safetensors"
        )
        with pytest.raises(UserError, match=message):
            train.run(recipe)
        return
    with pytest.MonkeyPatch.context() as patch:
        real = train.FineTuner.training_step

        def training_step(self, *args, **kwargs):
            DAMAGES["cut"](weights)
            return real(self, *args, **kwargs)

        patch.setattr(train.FineTuner, "training_step", training_step)
        with pytest.raises(
            UserError, match="the best checkpoint .*checkpoint-2 is damaged: adapter_model.safetensors"
        ):
            train.run(recipe)


def test_with_room_for_one_checkpoint_the_old_one_goes_when_the_new_one_is_whole(tmp_path, base, monkeypatch):
    seen = []
    real = train.MarkCheckpoints.on_save

    def on_save(self, args, state, *rest, **kwargs):
        seen.append(sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")))
        real(self, args, state, *rest, **kwargs)
        seen.append(sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")))

    monkeypatch.setattr(train.MarkCheckpoints, "on_save", on_save)
    train.run(make_recipe(tiny_values(tmp_path, base, **{"training.save_total_limit": 1})))
    two, four, six = ([f"checkpoint-{step}"] for step in (2, 4, 6))
    assert seen == [two, two, two + four, four, four + six, six]


def test_a_seal_names_the_first_difference(tmp_path):
    files = {"a.bin": b"0123456789", "deep/b.bin": b"x" * 100}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    seal(tmp_path)
    assert damage(tmp_path) == ""
    (tmp_path / "c.bin").write_bytes(b"later")
    assert damage(tmp_path) == ""
    seal(tmp_path)
    (tmp_path / "c.bin").write_bytes(b"other")
    assert damage(tmp_path) == "c.bin has changed since it was written"
    (tmp_path / "deep" / "b.bin").write_bytes(b"x" * 99)
    assert damage(tmp_path) == "deep/b.bin has 99 bytes instead of 100"
    (tmp_path / "a.bin").unlink()
    assert damage(tmp_path) == "a.bin is missing"
    for broken in ("", "[]", '{"files": {"a.bin": 3}}', '{"files": [1]}'):
        (tmp_path / COMPLETE).write_text(broken)
        assert damage(tmp_path) == "its complete, which lists the other files, cannot be read"


def test_a_checkpoint_without_its_mark_counts_for_nothing(tmp_path):
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        seal(tmp_path / f"checkpoint-{step}")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    (tmp_path / "checkpoint-10" / COMPLETE).unlink()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


ESFT = {"lora.targets": None, "lora.r": None, "esft.top_p": 0.4}


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda run: (run / "expert_cfg.json").write_text('{"experts": {"1": [0]}}'), "does not follow from .*scores"),
        (lambda run: (run / "expert_cfg.json").write_text("{"), "expert_cfg.json is not JSON"),
        (lambda run: (run / "expert_scores.json").write_text("{"), "expert_scores.json is not JSON"),
        (
            lambda run: [(run / name).unlink() for name in ("expert_cfg.json", "expert_scores.json")],
            "expert_cfg.json is missing, by which .*checkpoint-2 was trained",
        ),
    ],
    ids=["another choice", "a broken choice", "broken scores", "neither"],
)
def test_experts_other_than_those_that_were_trained_are_refused(tmp_path, base, spoil, message):
    values = {key: value for key, value in tiny_values(tmp_path, base, **ESFT).items() if value is not None}
    with stopped_at(3):
        train.run(make_recipe(values))
    spoil(tmp_path / "run")
    with pytest.raises(UserError, match=message):
        train.run(make_recipe(values))


def test_a_choice_that_was_lost_is_made_by_the_scores_again(tmp_path, base):
    values = {key: value for key, value in tiny_values(tmp_path, base, **ESFT).items() if value is not None}
    with stopped_at(3):
        train.run(make_recipe(values))
    kept = (tmp_path / "run" / "expert_cfg.json").read_text()
    (tmp_path / "run" / "expert_cfg.json").unlink()
    train.run(make_recipe(values))
    assert (tmp_path / "run" / "expert_cfg.json").read_text() == kept
    assert all(
        torch.isfinite(tensor).all() for tensor in load_file(tmp_path / "run/adapter/model.safetensors").values()
    )
