"""What a verb takes a name for: a model, an adapter with its base, or a run, in which both are found."""

import json

import pytest
import yaml

from modeling_deepseek_moe.finetune.errors import UserError
from modeling_deepseek_moe.finetune.runs.named import Named, named, named_model, named_source


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A base; runs that saved an adapter, a model, both, and nothing yet."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    for name, parts in {"lora": ["adapter"], "full": ["model"], "merged": ["adapter", "model"], "begun": []}.items():
        run = tmp_path / "runs" / name
        run.mkdir(parents=True)
        (run / "recipe.yaml").write_text(yaml.safe_dump({"model": "base", "data": "d", "output_dir": str(run)}))
        for part in parts:
            (run / part).mkdir()
            file, fields = (
                ("adapter_config", {"base_model_name_or_path": "base"}) if part == "adapter" else ("config", {})
            )
            (run / part / f"{file}.json").write_text(json.dumps(fields))
        if parts:
            (run / "summary.json").write_text('{"steps": 1}')
    return tmp_path


def test_of_a_run_with_an_adapter_it_is_the_adapter_on_its_base(here):
    expected = Named("base", str(here / "runs" / "lora" / "adapter"))
    assert named("runs/lora") == named("runs/lora/") == named("runs/lora/adapter") == expected


@pytest.mark.parametrize("run", ["full", "merged"])
def test_of_a_run_with_a_whole_model_it_is_that_and_what_it_was_trained_from(here, run):
    model = str(here / "runs" / run / "model")
    assert named(f"runs/{run}") == Named(model, None, "base")
    assert named(f"runs/{run}/model") == Named(model)
    assert named_model(f"runs/{run}") == model


def test_models_and_hub_names_stay_what_they_are(here):
    assert named("base") == Named("base")
    assert named("deepseek-ai/DeepSeek-V2-Lite", "me/adapter") == Named("deepseek-ai/DeepSeek-V2-Lite", "me/adapter")
    assert named("base", "runs/lora") == Named("base", str(here / "runs" / "lora" / "adapter"))


def test_convert_reads_what_the_format_is_about(here):
    lora, base = here / "runs" / "lora", here / "base"
    assert named_source(lora, None, wants_adapter=True) == (lora / "adapter", None)
    assert named_source(here / "runs" / "full", None, wants_adapter=False) == (here / "runs" / "full" / "model", None)
    source, adapter = named_source(lora, None, wants_adapter=False)
    assert (source.resolve(), adapter) == (base, lora / "adapter")
    assert named_source(base, lora, wants_adapter=False) == (base, lora / "adapter")


@pytest.mark.parametrize(
    "wrong, message",
    [
        (
            lambda: named("runs/first/adapter"),
            "cannot load model 'runs/first/adapter': it does not exist; .*/runs has begun, full, lora, merged",
        ),
        (lambda: named("./runs/first"), "cannot load model './runs/first': it does not exist"),
        (
            lambda: named("base", "runs/first/adapter"),
            "cannot put adapter 'runs/first/adapter' on the model: it does not exist",
        ),
        (lambda: named("runs/begun"), "has no results yet"),
        (lambda: named("runs/lora", "me/adapter"), "has an adapter of its own"),
        (lambda: named("base", "runs/full"), "saved a whole model and no adapter"),
        (lambda: named_model("runs/lora"), r"merge it first \(`deepseek-moe convert runs/lora DST --to bf16`\)"),
    ],
    ids=["no part", "no run", "no adapter", "begun", "two adapters", "adapter of a model", "training on an adapter"],
)
def test_what_cannot_be_meant_is_said_with_the_way_out(here, wrong, message):
    with pytest.raises(UserError, match=message):
        wrong()


def test_a_base_that_is_not_there_any_more_is_named(here):
    (here / "base").rename(here / "elsewhere")
    with pytest.raises(UserError, match="was trained from base, which does not exist here: name that model"):
        named("runs/lora")


def test_a_base_on_the_hub_is_downloaded_before_it_is_converted(here):
    recipe = here / "runs" / "lora" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("model: base", "model: me/base"))
    with pytest.raises(UserError, match=r"hf download me/base --local-dir BASE"):
        named_source(here / "runs" / "lora", None, wants_adapter=False)
