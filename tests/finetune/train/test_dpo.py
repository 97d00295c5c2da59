"""Learning from preferences: rows, runs from recipe to files, and what is refused."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_run import stopped_at, tiny_tokenizer, tiny_values, write_jsonl

from modeling_deepseek_moe import DeepseekMoeForCausalLM
from modeling_deepseek_moe.finetune.data.preferences import encode_preference
from modeling_deepseek_moe.finetune.data.report import RowError
from modeling_deepseek_moe.finetune.errors import RecipeError
from modeling_deepseek_moe.finetune.recipe.load import make_recipe
from modeling_deepseek_moe.finetune.train import one_run as train

USER = {"role": "user", "content": "w1 w2"}
CHOSEN, REJECTED = ({"role": "assistant", "content": content} for content in ("w3 w4", "w5"))


def pairs(count=24):
    """The chosen answers end with one word, the rejected ones with two others."""
    starts = [(7 * i) % 70 for i in range(count)]
    return [{"prompt": f"w{i}", "chosen": f" w{i + 1} w75", "rejected": f" w{i + 1} w76 w77"} for i in starts]


def recipe_of(folder, base, whole=False, **overrides):
    folder.mkdir(exist_ok=True)
    values = tiny_values(folder, base, **{"dpo.beta": 0.2, "training.max_steps": 4, **overrides})
    write_jsonl(folder / "rows.jsonl", pairs())
    return make_recipe({key: value for key, value in values.items() if not (whole and key.startswith("lora"))})


def log_probability(model, prompt, answer):
    """Of an answer after a prompt, both token ids."""
    ids = torch.tensor([[*prompt, *answer]])
    with torch.no_grad():
        log_probs = model(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(dim=-1)
    return log_probs.gather(1, torch.tensor(answer)[:, None]).sum().item()


def encoded(row, max_length=64, long_rows="cut", **options):
    (made,), how = encode_preference(row, tiny_tokenizer(), max_length, long_rows, **options)
    return *(" ".join(tiny_tokenizer().convert_ids_to_tokens(ids)) for ids in made.values()), how


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [CHOSEN], "rejected": [REJECTED]},
        {"prompt": [USER], "chosen": "w3 w4", "rejected": "w5"},
        {"chosen": [USER, CHOSEN], "rejected": [USER, REJECTED], "score": 3, "prompt": None},
    ],
    ids=["messages", "messages and text", "no prompt of its own"],
)
def test_conversations_become_a_prompt_and_two_answers(row):
    assert encoded(row) == ("<s> <user> w1 w2 <bot>", "w3 w4 </s>", "w5 </s>", None)


def test_earlier_answers_belong_to_the_prompt():
    row = {"prompt": [USER, CHOSEN, USER], "chosen": [CHOSEN], "rejected": [REJECTED]}
    assert encoded(row)[:2] == ("<s> <user> w1 w2 <bot> w3 w4 </s> <user> w1 w2 <bot>", "w3 w4 </s>")


def test_text_has_bos_once_and_ends_with_eos():
    for prompt, split in (("w1", True), ("<s> w1", False)):
        row = {"prompt": prompt, "chosen": " w2", "rejected": " w3"}
        assert encoded(row, split_special_tokens=split) == (
            "<s> w1",
            "w2 </s>",
            "w3 </s>",
            None,
        )


def test_long_answers_are_cut():
    row = {"prompt": "w1", "chosen": " w2 w3 w4", "rejected": " w5"}
    assert encoded(row, max_length=4) == ("<s> w1", "w2 w3", "w5 </s>", "cut")
    with pytest.raises(RowError, match="has more tokens than max_length=4"):
        encoded(row, max_length=4, long_rows="skip")


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"text": "w1"}, "of no known kind"),
        ({"prompt": "w1", "chosen": "w2"}, "of no known kind"),
        ({"prompt": "w1", "chosen": "w2", "rejected": " "}, "empty"),
        ({"prompt": "w1", "chosen": "w2", "rejected": "w2"}, "no preference"),
        ({"prompt": [USER], "chosen": [CHOSEN, USER, CHOSEN], "rejected": [REJECTED]}, "no preference"),
        ({"chosen": [USER, CHOSEN], "rejected": [CHOSEN, REJECTED]}, "no preference"),
        ({"prompt": [{"content": "w1"}], "chosen": "w2", "rejected": "w3"}, "malformed messages"),
        ({"prompt": "w1 w2 w3 w4", "chosen": "w2", "rejected": "w3"}, "nothing to learn is left after the cut"),
    ],
    ids=["text", "half", "empty", "alike", "several answers", "two prompts", "no role", "long prompt"],
)
def test_a_row_that_prefers_nothing_is_told_by_its_reason(row, reason):
    with pytest.raises(RowError) as caught:
        encode_preference(row, tiny_tokenizer(), 5, "cut")
    assert caught.value.reason == reason


def test_a_stopped_run_with_adapters_ends_as_if_it_had_not_been(tmp_path, base):
    at_once = train.run(recipe_of(tmp_path / "a", base))
    with stopped_at(3, "checkpoint-2 is saved"):
        train.run(recipe_of(tmp_path / "b", base))
    in_two = train.run(recipe_of(tmp_path / "b", base))
    assert in_two["resumed_from"] == "checkpoint-2"
    one, other = (load_file(tmp_path / name / "run" / "adapter" / "adapter_model.safetensors") for name in "ab")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert at_once["eval_loss_after"] == in_two["eval_loss_after"]

    # Nothing is preferred at first: -log sigmoid(0).
    assert at_once["eval_loss_before"] == pytest.approx(0.6931, abs=1e-4)
    assert at_once["eval_loss_after"] < 0.6
    assert at_once["preference_accuracy"] > 0.8 and at_once["preference_margin"] > 0.2
    assert not (tmp_path / "a" / "run" / "README.md").exists()

    # The adapter alone holds what was learned: the margin is of its log-probabilities over those of the base model.
    model = DeepseekMoeForCausalLM.from_pretrained(base).eval()
    row = encode_preference(pairs(1)[0], tiny_tokenizer(), 32, "cut")[0][0]
    sides = [(row["prompt_ids"], row[f"{side}_ids"]) for side in ("chosen", "rejected")]
    before = [log_probability(model, *side) for side in sides]
    tuned = PeftModel.from_pretrained(model, at_once["saved_adapter"]).eval()
    after = [log_probability(tuned, *side) for side in sides]
    assert (after[0] - before[0]) - (after[1] - before[1]) > 0.5


def test_the_whole_model_learns_against_what_it_was(tmp_path, base, capsys):
    """In one run the reference's log-probabilities are computed before, in the other by another model at each step."""
    options = {"gradient_checkpointing": True, "training.save_steps": 4}
    before = train.run(recipe_of(tmp_path / "before", base, whole=True, **options))
    options["dpo.precompute_ref_log_probs"] = False
    beside = train.run(recipe_of(tmp_path / "beside", base, whole=True, **options))
    assert before["preference_accuracy"] > 0.8 and before["saved_model"] and not before["saved_adapter"]
    # The same float32 numbers from batches padded to other lengths.
    assert beside["eval_loss_after"] == pytest.approx(before["eval_loss_after"], rel=1e-4)
    assert "preferred rightly" in capsys.readouterr().out
    assert json.loads((tmp_path / "before" / "run" / "data_report.json").read_text())["data"]["kept"] == 24


def test_balance_losses_are_learned_from_and_logged(tmp_path, base):
    histories = []
    for alpha in (0.0, 0.5):
        folder = tmp_path / str(alpha)
        train.run(recipe_of(folder, base, **{"losses.aux_loss_alpha": alpha, "training.max_steps": 2}))
        state = json.loads((folder / "run" / "trainer_state.json").read_text())
        histories.append([row for row in state["log_history"] if "loss" in row])
    (before, _), (first, second) = histories
    assert all("aux_loss" not in row for row in histories[0])
    # Perfect balance costs alpha in each of the two MoE layers; nothing is preferred at first.
    assert 2 * 0.5 * 0.8 < first["aux_loss"] < 2 * 0.5 * 8
    assert first["loss"] == pytest.approx(before["loss"]) == pytest.approx(0.6931, abs=1e-4)
    assert first["grad_norm"] > 1.01 * before["grad_norm"] and second["aux_loss"] != first["aux_loss"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"packing": True}, "`packing` does not work with the `dpo` keys"),
        ({"losses.mtp_loss_weight": 0.1}, "`losses.mtp_loss_weight` has no effect with the `dpo` keys"),
        ({"quantization": "nf4", "dpo.precompute_ref_log_probs": True}, "does not work with `quantization`"),
        ({"dpo.max_length": 5}, "unknown recipe key `dpo.max_length`"),
    ],
    ids=["packing", "other losses", "four bits", "a length of its own"],
)
def test_what_does_not_go_with_preferences_is_said(tmp_path, base, changes, message):
    with pytest.raises(RecipeError, match=message):
        recipe_of(tmp_path / "run", base, **changes)


def test_settings_that_trl_refuses_end_in_one_line(tmp_path, base):
    with pytest.raises(RecipeError, match="Unknown loss type: sigmod") as caught:
        train.run(recipe_of(tmp_path / "run", base, **{"dpo.loss_type": ["sigmod"]}))
    assert "\n" not in str(caught.value)
