"""Keys are shown as they are checked: the same names, and defaults that a run really has."""

import dataclasses

import pytest
from peft import LoraConfig, PeftConfig
from transformers import TrainingArguments

from modeling_deepseek_moe.finetune.errors import nearest
from modeling_deepseek_moe.finetune.recipe.keys import find_keys, recipe_keys
from modeling_deepseek_moe.finetune.recipe.schema import EsftOptions, Recipe
from modeling_deepseek_moe.finetune.recipe.sections import ALSO_CALLED, DEFAULTS, SECTIONS, section_hints


@pytest.fixture(scope="module")
def keys():
    return {key.name: key for key in recipe_keys()}


def test_every_key_that_is_checked_is_shown_and_no_other(keys):
    checked = {item.name for item in dataclasses.fields(Recipe)} - set(SECTIONS)
    checked |= {f"{section}.{name}" for section, hints in section_hints(SECTIONS).items() for name in hints}
    # What every PEFT method has says nothing that a recipe would.
    inherited = {f"lora.{item.name}" for item in dataclasses.fields(PeftConfig)}
    assert set(keys) == checked - inherited


@pytest.mark.parametrize(
    "section, source",
    [("", Recipe), ("esft.", EsftOptions), ("lora.", LoraConfig), ("training.", TrainingArguments)],
    ids=["recipe", "esft", "lora", "training"],
)
def test_a_default_is_what_a_run_has(keys, section, source):
    compared = 0
    for item in dataclasses.fields(source):
        key = keys.get(f"{section}{item.name}")
        if key is None or key.default in (None, "chosen by the library"):
            continue
        default = item.default if item.default is not dataclasses.MISSING else item.default_factory()
        default = DEFAULTS.get(section.removesuffix("."), {}).get(item.name, default)
        default = getattr(default, "value", default)  # of an enum
        assert key.default.strip("'\"") == str(default) or eval(key.default) == default, key
        compared += 1
    assert compared > 4


def test_nearly_every_key_has_a_line(keys):
    without = [key.name for key in keys.values() if not key.line]
    assert len(without) < len(keys) / 50, without
    assert all("\n" not in key.line for key in keys.values())


def test_names_from_elsewhere_are_of_keys(keys):
    assert set(ALSO_CALLED.values()) <= set(keys)


def test_keys_are_found_by_a_part_of_the_name_by_another_name_and_by_what_they_do():
    assert [key.name for key in find_keys("bias_update")] == ["bias_update_speed"]
    assert "training.learning_rate" in [key.name for key in find_keys("lr")]
    assert "lora.use_dora" in [key.name for key in find_keys("Weight-Decomposed")]
    assert find_keys("no such thing") == []


@pytest.mark.parametrize(
    "word, meant",
    [
        ("learning_rate", "training.learning_rate"),
        ("lora.learning_rate", "training.learning_rate"),
        ("training.learnig_rate", "training.learning_rate"),
        ("num_epochs", "training.num_train_epochs"),
        ("max_lenght", "max_length"),
        ("lora.lora_alhpa", "lora.lora_alpha"),
    ],
)
def test_what_was_meant(keys, word, meant):
    assert nearest(word, keys) == meant
