"""Fine-tuning runs from a recipe to files, on tiny models."""

import itertools
import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from huggingface_hub import HfApi
from peft import PeftModel
from safetensors.torch import load_file
from tiny import tiny_ids
from tiny_run import counting_rows, full, stopped_at, tiny_base, tiny_values, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_deepseek_moe import DeepseekMoeForCausalLM
from modeling_deepseek_moe.finetune.demo.local_hub import LocalHub
from modeling_deepseek_moe.finetune.errors import RecipeError, UserError
from modeling_deepseek_moe.finetune.hub import upload as publish
from modeling_deepseek_moe.finetune.recipe.load import make_recipe
from modeling_deepseek_moe.finetune.train import one_run as train


def weights(folder):
    return load_file(next(folder.glob("*.safetensors")))


def assert_same(one, other):
    """Bit-equal: the same float32 operations in the same order."""
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", ["messages", "prompt", "text"])
def test_a_run_learns_and_leaves_everything_it_promises(go, tmp_path, kind, capsys):
    summary = go(kind=kind)
    out = tmp_path / "run"
    assert summary["eval_loss_after"] < summary["eval_loss_before"]
    assert (summary["steps"], summary["train_rows"], summary["eval_rows"]) == (6, 18, 6)
    assert json.loads((out / "summary.json").read_text()) == summary
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 6
    assert AutoTokenizer.from_pretrained(out / "adapter").chat_template
    assert "before" in capsys.readouterr().out
    assert not list(out.rglob("*.aside"))


def test_the_merged_model_computes_what_the_adapter_does(go, tmp_path, base):
    summary = go(merge=True)
    plain = DeepseekMoeForCausalLM.from_pretrained(base)
    ids = tiny_ids(plain.config)
    with torch.no_grad():
        unadapted = plain(ids).logits
        adapted = PeftModel.from_pretrained(plain, summary["saved_adapter"]).eval()(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(summary["saved_model"])(ids).logits
    # B A x added to the output or to the weight: float32 rounding of logits of about 10.
    torch.testing.assert_close(merged, adapted, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(unadapted, adapted, atol=1e-2)


def test_without_targets_every_weight_is_trained(tmp_path, base):
    summary = train.run(make_recipe(full(tiny_values(tmp_path, base))))
    assert summary["saved_adapter"] is None
    assert summary["eval_loss_after"] < summary["eval_loss_before"]
    before, after = weights(base), weights(tmp_path / "run" / "model")
    # The multi-token layer has no loss, but holds copies of embedding and head; the bias is no parameter.
    copies = {"model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight"}
    frozen = {name for name in before if "layers.3." in name or "e_score_correction_bias" in name} - copies
    unchanged = {name for name in before if torch.equal(before[name], after[name])}
    assert frozen <= unchanged
    # Rows of 5 tokens do not reach every routed expert.
    assert all(".mlp.experts." in name for name in unchanged - frozen)
    assert any(".mlp.experts." in name for name in before.keys() - unchanged)


@pytest.mark.parametrize(
    "whole, step, saved",
    [(False, 3, "checkpoint-2"), (True, 3, "checkpoint-2"), (False, 1, None)],
    ids=["adapters", "whole model", "before the first checkpoint"],
)
def test_an_interrupted_run_ends_as_if_it_had_not_been(tmp_path, base, whole, step, saved):
    def recipe(folder):
        (tmp_path / folder).mkdir(exist_ok=True)
        values = tiny_values(tmp_path / folder, base, **{"lora.targets": ["attention"], "lora.lora_dropout": 0.2})
        return make_recipe(full(values) if whole else values)

    at_once = train.run(recipe("a"))
    with stopped_at(step, f"{saved} is saved; the same command goes on from there" if saved else "no checkpoint"):
        train.run(recipe("b"))
    in_two = train.run(recipe("b"))
    assert (at_once["resumed_from"], in_two["resumed_from"]) == (None, saved)
    result = "model" if whole else "adapter"
    assert_same(weights(tmp_path / "a" / "run" / result), weights(tmp_path / "b" / "run" / result))
    same = ("steps", "train_loss", "eval_loss_before", "eval_loss_after")
    assert [at_once[key] for key in same] == [in_two[key] for key in same]


def test_a_stop_before_the_first_checkpoint_says_so(go):
    with stopped_at(1, "no checkpoint was written yet"):
        go()


def test_a_half_written_checkpoint_is_not_resumed_from(go, tmp_path):
    with stopped_at(5, "checkpoint-4 is saved"):
        go()
    newest = tmp_path / "run" / "checkpoint-4"
    (newest / "complete").unlink()
    (newest / "optimizer.pt").write_bytes(b"cut off")
    (tmp_path / "run" / "adapter.aside").mkdir()
    assert go()["resumed_from"] == "checkpoint-2"
    assert not (tmp_path / "run" / "adapter.aside").exists()


def test_a_finished_run_is_not_trained_further(go, tmp_path):
    first = go()
    trained = weights(tmp_path / "run" / "adapter")
    again = go(merge=True)
    assert (again["steps"], again["eval_loss_after"]) == (first["steps"], first["eval_loss_after"])
    assert_same(weights(tmp_path / "run" / "adapter"), trained)
    assert again["saved_model"]


def test_a_finished_run_gives_back_its_best_checkpoint(go, tmp_path):
    best = {"training.load_best_model_at_end": True, "training.eval_strategy": "steps", "training.eval_steps": 2}
    first = go(**best)
    trained = weights(tmp_path / "run" / "adapter")
    shutil.rmtree(tmp_path / "run" / "adapter")
    assert go(**best)["eval_loss_after"] == first["eval_loss_after"]
    assert_same(weights(tmp_path / "run" / "adapter"), trained)


def test_the_folder_of_another_run_is_kept_unless_told_otherwise(go, tmp_path):
    go()
    with pytest.raises(RecipeError, match=r"holds another run \(its `seed` is 42, not 7\).*overwrite: true"):
        go(seed=7)
    note = tmp_path / "run" / "notes.txt"
    note.write_text("mine")
    assert go(seed=7, overwrite=True)["resumed_from"] is None
    assert note.read_text() == "mine"


def test_changed_rows_are_another_run(go, tmp_path):
    go()
    values = tiny_values(tmp_path, tmp_path)
    write_jsonl(tmp_path / "rows.jsonl", counting_rows("text"))
    with pytest.raises(RecipeError, match="the rows of `data` have changed since"):
        train.run(
            make_recipe({**values, "model": yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["model"]})
        )


def test_a_folder_of_other_files_is_never_emptied(go, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(RecipeError, match="holds files that are not of a run: choose another folder"):
            go(overwrite=overwrite)
    assert (tmp_path / "run" / "thesis.tex").read_text() == "years of work"


def test_rows_to_measure_on_can_be_a_file_of_their_own_or_none(go, tmp_path):
    held_out = write_jsonl(tmp_path / "held_out.jsonl", counting_rows("text", 5))
    summary = go(eval_data=str(held_out))
    assert (summary["train_rows"], summary["eval_rows"]) == (24, 5)
    summary = go(eval_fraction=0, output_dir=str(tmp_path / "none"))
    assert (summary["eval_rows"], summary["eval_loss_before"], summary["eval_loss_after"]) == (0, None, None)


def test_gradient_checkpointing_changes_no_number(go, tmp_path):
    plain = go()
    thrifty = go(gradient_checkpointing=True, output_dir=str(tmp_path / "thrifty"))
    # Recomputation repeats the same operations.
    assert thrifty["eval_loss_after"] == pytest.approx(plain["eval_loss_after"], rel=1e-6)


def test_the_routing_bias_moves_if_the_recipe_says_so_and_is_saved(tmp_path, base):
    """What it moves by is `test_balance_callback.py`'s."""
    values = full(tiny_values(tmp_path, base)) | {"bias_update_speed": 0.01, "gradient_checkpointing": True}
    values |= {"training.max_steps": 1, "training.gradient_accumulation_steps": 3, "training.learning_rate": 0.0}
    train.run(make_recipe(values))
    before, after = weights(base), weights(tmp_path / "run" / "model")
    for layer in (1, 2):
        name = f"model.layers.{layer}.mlp.gate.e_score_correction_bias"
        # One step: a bias of 0.2 plus or minus 0.01, rounded once in float32.
        moved = (after[name] - before[name]) / 0.01
        torch.testing.assert_close(moved, moved.round(), atol=1e-4, rtol=0)
        assert moved.abs().max().round() == 1


def test_a_model_without_a_routing_bias_cannot_have_it_moved(tmp_path):
    values = full(tiny_values(tmp_path, tiny_base(tmp_path / "v1", "v1")))
    with pytest.raises(RecipeError, match="e_score_correction_bias, which this model has not"):
        train.run(make_recipe({**values, "bias_update_speed": 0.001}))


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"model": "/nowhere/model"}, "cannot load model '/nowhere/model'"),
        ({"lora.lora_dropout": 0.1}, "`lora.*`: lora_dropout=0.1 does not work with routed_experts, router"),
        ({"training.lr_scheduler_type": "cosin"}, "`training.*`: cosin is not a valid SchedulerType"),
        ({"training.optim": "adam"}, "`training.*`: adam is not a valid OptimizerNames"),
        ({"attn_implementation": "flash"}, "cannot load model"),
        ({"data": "absent.jsonl"}, "data 'absent.jsonl' does not exist"),
        ({"training.eval_strategy": "steps", "eval_fraction": 0}, "these settings do not go together: You have set"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_run_ends_in_one_line(go, overrides, message):
    with pytest.raises(UserError) as caught:
        go(**overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_of_another_model_is_refused(go, base, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(base, other)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens([f"new{i}" for i in range(30)])
    tokenizer.save_pretrained(other)
    with pytest.raises(UserError, match="vocab_size=96 but its tokenizer knows 116 tokens"):
        go(model=str(other))


def test_a_killed_process_goes_on_from_its_last_whole_checkpoint(tmp_path, base):
    def recipe(folder):
        (tmp_path / folder).mkdir(exist_ok=True)
        return tiny_values(tmp_path / folder, base, **{"training.max_steps": 20})

    (tmp_path / "killed.yaml").write_text(yaml.safe_dump(recipe("b")))
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "modeling_deepseek_moe.cli.main", "finetune", str(tmp_path / "killed.yaml")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as child:
        # The third line of a step can only follow the checkpoint of the second.
        steps = (line for line in child.stdout if line.startswith("step "))
        assert len(list(itertools.islice(steps, 3))) == 3
        child.send_signal(signal.SIGKILL)
    assert not (tmp_path / "b" / "run" / "summary.json").exists()
    resumed, at_once = train.run(make_recipe(recipe("b"))), train.run(make_recipe(recipe("a")))
    assert resumed["resumed_from"] and resumed["steps"] == 20
    # Same operations, but the first steps ran in another process, whose thread count may sum in another order.
    assert resumed["eval_loss_after"] == pytest.approx(at_once["eval_loss_after"], rel=1e-3)


PUSH = """
import sys
from modeling_deepseek_moe.finetune.recipe.load import load_recipe
from modeling_deepseek_moe.finetune.train.one_run import run
print(run(load_recipe(sys.argv[1]))["hub"])
from transformers import AutoModelForCausalLM
print(type(AutoModelForCausalLM.from_pretrained("me/tuned")).__name__)
"""


def test_the_result_is_pushed_and_loads_by_name(tmp_path, base):
    values = tiny_values(tmp_path, base, merge=True, hub_id="me/tuned")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    with LocalHub(tmp_path / "hub", lfs=True) as hub:
        done = subprocess.run(
            [sys.executable, "-c", PUSH, str(tmp_path / "recipe.yaml")],
            env={**hub.environment(tmp_path / "home"), "HF_TOKEN": "hf_private"},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        files = HfApi(endpoint=hub.endpoint, token="any").list_repo_files("me/tuned")
    assert done.stdout.splitlines()[-2:] == [f"{hub.endpoint}/me/tuned", "DeepseekMoeForCausalLM"]
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "loss.png"} <= set(files)
    assert "hf_private" not in done.stdout + done.stderr
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not any(b"hf_private" in path.read_bytes() for path in written)


def test_a_hub_that_refuses_ends_in_one_line(tmp_path):
    with LocalHub(tmp_path / "hub") as hub, pytest.raises(UserError) as caught:
        publish.make_repo("me/tuned", endpoint=hub.endpoint, token=False)
    assert "cannot write to 'me/tuned' on the Hub: " in str(caught.value)
    assert "hf auth login" in str(caught.value) and "\n" not in str(caught.value)


def test_an_upload_that_fails_says_that_the_result_is_safe(tmp_path, base):
    with (
        LocalHub(tmp_path / "hub") as hub,
        pytest.raises(UserError, match="upload to 'me/none' failed.*is complete"),
    ):
        publish.push(base, "me/none", endpoint=hub.endpoint, token="any")
