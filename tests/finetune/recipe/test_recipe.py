"""Recipes: what is read from where, and that nothing wrong in them passes in silence."""

import pytest

from modeling_deepseek_moe.finetune.errors import RecipeError
from modeling_deepseek_moe.finetune.recipe.load import SHIPPED, dump_recipe, load_recipe, make_recipe
from modeling_deepseek_moe.finetune.recipe.schema import Recipe

NEEDED = {"model": "m", "data": "rows.jsonl", "output_dir": "out"}


def write(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_flat_file_becomes_a_recipe(tmp_path):
    recipe = load_recipe(
        write(tmp_path, "model: m\ndata: d\noutput_dir: o\nlora.targets: [attention]\ntraining.learning_rate: 1e-4\n")
    )
    assert recipe == Recipe(
        model="m", data="d", output_dir="o", lora={"targets": ["attention"]}, training={"learning_rate": 1e-4}
    )


def test_sections_may_be_nested(tmp_path):
    text = "model: m\ndata: d\noutput_dir: o\nlora:\n  targets: [router]\n  r: 8\ntraining:\n  max_steps: 3\n"
    recipe = load_recipe(write(tmp_path, text))
    assert (recipe.lora, recipe.training) == ({"targets": ["router"], "r": 8}, {"max_steps": 3})


def test_the_command_line_wins_over_the_file(tmp_path):
    path = write(tmp_path, "model: m\ndata: d\noutput_dir: o\nseed: 1\nlora: {targets: [attention], r: 8}\n")
    overrides = ["seed=2", "lora.r=16", "lora.targets=[router, all]", "training.learning_rate=1e-3", "merge=true"]
    recipe = load_recipe(path, overrides)
    assert (recipe.seed, recipe.merge, recipe.training) == (2, True, {"learning_rate": 1e-3})
    assert recipe.lora == {"targets": ["router", "all"], "r": 16}


def test_a_value_may_contain_an_equals_sign_and_look_like_a_number(tmp_path):
    path = write(tmp_path, "model: m\ndata: d\noutput_dir: o\n")
    recipe = load_recipe(path, ["data=a=b.jsonl", "output_dir=2024", "eval_data=null"])
    assert (recipe.data, recipe.output_dir, recipe.eval_data) == ("a=b.jsonl", "2024", None)


def test_a_recipe_is_written_and_read_back_alike(tmp_path):
    recipe = make_recipe({**NEEDED, "lora.targets": ["all"], "training.learning_rate": 1e-5, "hub_id": "me/größer"})
    assert load_recipe(write(tmp_path, dump_recipe(recipe))) == recipe


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_needs_only_data_and_a_folder(name):
    with pytest.raises(RecipeError, match="lacks `data`"):
        load_recipe(name)
    recipe = load_recipe(name, ["data=rows.jsonl", "output_dir=out"])
    assert recipe == load_recipe(SHIPPED[name], ["data=rows.jsonl", "output_dir=out"])


@pytest.mark.parametrize(
    "values, message",
    [
        ({"modle": "m"}, "unknown recipe key `modle`: did you mean `model`?"),
        ({"learning_rate": 1e-4}, "unknown recipe key `learning_rate`: did you mean `training.learning_rate`?"),
        ({"training.lerning_rate": 1}, "did you mean `training.learning_rate`?"),
        (
            {"training": {"max_stpes": 1}},
            "unknown recipe key `training.max_stpes`: did you mean `training.max_steps`?",
        ),
        ({"lora.alpha": 8}, "unknown recipe key `lora.alpha`: did you mean `lora.lora_alpha`?"),
        ({"lora.target_modules": ["x"]}, "unknown recipe key `lora.target_modules`"),
        ({"lora.targets": ["rooter"]}, "unknown word 'rooter'"),
        ({"lora.r": 8}, "`lora.r` has no effect without `lora.targets`"),
        ({"lora": 8}, "`lora` is a number"),
        ({"merge": True}, "no adapters to merge"),
        ({"model": 7}, "`model` is 7, a number; it must be text (put it in quotes)"),
        ({"model": None}, "`model` is None, nothing; it must be text"),
        ({"max_length": 1.5}, "`max_length` is 1.5, a number; it must be a whole number"),
        ({"max_length": True}, "`max_length` is True, a truth value; it must be a whole number"),
        ({"merge": "yes please"}, "it must be true or false"),
        ({"lora.targets": [1]}, "`lora.targets` is a list of words"),
        ({"lora.bias": "some", "lora.targets": "all"}, "it must be 'none' or 'all' or 'lora_only'"),
        ({"lora.init_lora_weights": "eva", "lora.targets": "all"}, "is 'eva', which needs a pass over data before"),
        ({"lora.init_lora_weights": "loftq", "lora.targets": "all"}, "quantised ones, which no run saves: choose one"),
        ({"lora.init_lora_weights": "pisa", "lora.targets": "all"}, "is 'pisa', which PEFT does not know: choose one"),
        (
            {"lora.init_lora_weights": "pissa", "lora.targets": "all", "dpo.beta": 0.1},
            "`lora.init_lora_weights: pissa` changes the base weights, which are the reference of the `dpo` keys",
        ),
        (
            {"lora.layer_replication": [[0, 2], [1, 3]], "lora.targets": "all", "merge": True},
            "`lora.layer_replication` shares weights between layers",
        ),
        ({"dtype": "fp16"}, "`dtype` is 'fp16': choose one of auto, float32, bfloat16, float16"),
        ({"max_length": 1}, "needs at least 2 tokens"),
        ({"eval_fraction": 1}, "it must be 0 at least and below 1"),
        ({"bias_update_speed": 0.001, "lora.targets": "all"}, "set it to 0 to freeze the bias, or set merge: true"),
        (
            {"training.label_smoothing_factor": 0.1},
            "`training.label_smoothing_factor` is not a recipe key: the Trainer",
        ),
        ({"losses.aux_loss_alfa": 0.1}, "unknown recipe key `losses.aux_loss_alfa`: did you mean"),
        ({"losses.aux_loss_alpha": "big"}, "`losses.aux_loss_alpha` is 'big', text; it must be a number"),
        ({"training.output_dir": "x"}, "`training.output_dir` is not a recipe key: set `output_dir`"),
        ({"training.resume_from_checkpoint": "x"}, "resumes by itself"),
        ({"training.eval_strategy": False}, "it must be text (put it in quotes)"),
        ({3: 4}, "unknown recipe key `3`"),
    ],
    ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else "",
)
def test_what_is_wrong_is_named_with_the_way_out(values, message):
    with pytest.raises(RecipeError) as caught:
        make_recipe({**NEEDED, **values})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_token_is_refused_without_being_repeated():
    with pytest.raises(RecipeError, match="tokens do not belong in a recipe") as caught:
        make_recipe({**NEEDED, "training.hub_token": "hf_secret"})
    assert "hf_secret" not in str(caught.value)


@pytest.mark.parametrize("key", NEEDED)
def test_a_missing_key_is_named(key):
    with pytest.raises(RecipeError, match=f"the recipe lacks `{key}`"):
        make_recipe({name: value for name, value in NEEDED.items() if name != key})


@pytest.mark.parametrize(
    "text, message",
    [
        ("model: [m\n", "line 2: not YAML"),
        ("model: m\nmodel: n\n", "line 1: not YAML: key 'model' is there twice"),
        ("- model\n", "it holds a list, not `key: value` lines"),
        ("", "it holds nothing"),
    ],
    ids=["cut off", "a key twice", "a list", "empty"],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, text, message):
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, text))
    assert message in str(caught.value)


def test_a_missing_or_binary_file_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"cannot read recipe .*none.yaml: No such file.*shipped .*lora_all"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="not UTF-8"):
        load_recipe(tmp_path / "binary.yaml")


@pytest.mark.parametrize("override", ["seed", "=3", ""])
def test_an_override_without_a_value_is_refused(tmp_path, override):
    with pytest.raises(RecipeError, match="not of the form key=value"):
        load_recipe(write(tmp_path, "model: m\n"), [override])
