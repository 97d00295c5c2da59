"""`~` in a recipe."""

from modeling_deepseek_moe.finetune.recipe.load import dump_recipe, load_recipe, make_recipe


def test_a_tilde_is_the_home_in_every_path_and_nothing_else(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = dict.fromkeys(("model", "data", "output_dir", "eval_data", "esft.experts"), "~/a")
    recipe = make_recipe({**paths, "data_split": "a~"})
    assert {recipe.model, recipe.data, recipe.output_dir, recipe.eval_data} == {f"{tmp_path}/a"}
    assert recipe.esft["experts"] == f"{tmp_path}/a" and recipe.data_split == "a~"
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    assert load_recipe(tmp_path / "recipe.yaml", ["data=~/b"]).data == f"{tmp_path}/b"
