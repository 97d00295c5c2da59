"""The table of ranges: it has every number that a recipe can have, and says what it wants."""

import math
import typing

import pytest

from modeling_deepseek_moe.finetune.errors import RecipeError
from modeling_deepseek_moe.finetune.recipe.load import load_recipe, make_recipe
from modeling_deepseek_moe.finetune.recipe.ranges import RANGES, check_number
from modeling_deepseek_moe.finetune.recipe.schema import Recipe
from modeling_deepseek_moe.finetune.recipe.sections import section_hints

NEEDED = {"model": "m", "data": "d", "output_dir": "o"}
# Keys of older or newer releases, of mappings, and where a process says its own rank.
NOT_EVERYWHERE = {"training.warmup_ratio", "lora.rank_pattern", "lora.alpha_pattern"}


def numbers(hint: object) -> bool:
    return hint in (int, float) or any(map(numbers, typing.get_args(hint)))


def test_every_number_of_a_recipe_has_a_range():
    hints = dict(typing.get_type_hints(Recipe))
    for section, of_section in section_hints({"dpo"}).items():
        hints |= {f"{section}.{key}": hint for key, hint in of_section.items()}
    found = {key for key, hint in hints.items() if numbers(hint)}
    assert found - RANGES.keys() == set()
    assert RANGES.keys() - hints.keys() <= NOT_EVERYWHERE


@pytest.mark.parametrize("key", RANGES)
def test_what_is_at_the_ends_of_a_range_is_taken_and_what_is_beyond_is_not(key):
    allowed = RANGES[key]
    for end, is_out, step in ((allowed.least, allowed.above, -1), (allowed.most, allowed.below, 1)):
        if not is_out:
            check_number(key, end)
        else:
            with pytest.raises(RecipeError):
                check_number(key, end)
        if end + step not in allowed.also:
            with pytest.raises(RecipeError, match=f"`{key}` is .* must be"):
                check_number(key, end + step)
    for number in (math.nan, math.inf, -math.inf):
        with pytest.raises(RecipeError, match=f"`{key}` is {number}"):
            check_number(key, number)


@pytest.mark.parametrize(
    "values, message",
    [
        (
            {"training.learning_rate": -1.0},
            "`training.learning_rate` is -1.0: it must be 0 at least and 1,000 at most",
        ),
        (
            {"seed": 10**20},
            "`seed` is a number of more than 20 digits: it must be 0 at least and 4,294,967,295 at most",
        ),
        ({"training.max_steps": 0}, "or -1 (-1 leaves it to num_train_epochs)"),
        ({"training.save_steps": 2.5}, "must be above 0 and 2,147,483,647 at most and whole from 1 on"),
        ({"lora.targets": "all", "lora.lora_alpha": 0}, "`lora.lora_alpha` is 0: it must be 1 at least"),
        ({"lora.targets": "all", "lora.rank_pattern": {"q": 0}}, "`lora.rank_pattern` holds 0: it must be 1 at least"),
        ({"lora.targets": "all", "lora.layer_replication": [[0]]}, "holds something else than it may"),
        ({"training.report_to": "comet_ml"}, "whose library is not installed: install that, or leave"),
        ({"training.report_to": "wanddb"}, "did you mean 'wandb'?"),
    ],
    ids=lambda value: str(list(value)) if isinstance(value, dict) else "",
)
def test_the_line_names_key_and_value_and_the_way_out(values, message):
    with pytest.raises(RecipeError) as caught:
        make_recipe({**NEEDED, **values})
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_an_alias_is_refused_by_its_line(tmp_path):
    (tmp_path / "recipe.yaml").write_text("model: m\na: &a [x]\nb: *a\n")
    with pytest.raises(
        RecipeError, match=r"line 3: not YAML: the alias \*a is not read: write out what it stands for"
    ):
        load_recipe(tmp_path / "recipe.yaml")
