"""The card of a published model: what it says, what it must not say, and whether the Hub would take it."""

import ast
import json
import re

import pytest
import typer
import yaml
from huggingface_hub import HfApi, ModelCard
from tiny import tiny_config

from modeling_deepseek_moe.cli.main import app
from modeling_deepseek_moe.finetune.demo.local_hub import LocalHub
from modeling_deepseek_moe.finetune.errors import UserError
from modeling_deepseek_moe.finetune.recipe.load import load_recipe
from modeling_deepseek_moe.finetune.runs.results import RunResults
from modeling_deepseek_moe.model_cards.card import licence_of, run_card
from modeling_deepseek_moe.model_cards.metadata import problems

RECIPE = {
    "model": "deepseek-ai/DeepSeek-V2-Lite",
    "data": "me/rows",
    "eval_data": None,
    "output_dir": "/home/me/runs/first",
    "eval_fraction": 0.1,
    "data_split": "train",
    "max_length": 512,
    "long_rows": "skip",
    "seed": 7,
    "bias_update_speed": 0.0,
    "losses": {},
    "esft": {},
    "dpo": {},
    "training": {"learning_rate": 2e-4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 8},
}
SUMMARY = {
    "lora": [],
    "trainable_parameters": 1_000_000,
    "parameters": 16_000_000,
    "train_rows": 1800,
    "eval_rows": 200,
    "steps": 56,
    "epochs": 1.0,
    "eval_loss_before": 2.5,
    "eval_loss_after": 1.25,
    "seconds": 3600.0,
    "seconds_per_step": 61.5,
    "device": "NVIDIA H100",
    "peak_memory": 41_500_000_000,
    "versions": {"torch": "2.13.0"},
}
LORA = {"targets": ["attention", "shared_experts"], "r": 8}
ADAPTER = {"r": 8, "target_modules": r"layers\.0\.self_attn\.q_proj", "target_parameters": None}


@pytest.fixture
def card(tmp_path):
    """Makes the card of a run whose recipe and summary differ from the above."""

    def card(kind="model", recipe=(), summary=(), files=None, base="deepseek-ai/DeepSeek-V2-Lite", **options):
        folder = tmp_path / "files"
        folder.mkdir(exist_ok=True)
        tiny_config("v3").save_pretrained(folder)
        for name, content in (files or {}).items():
            (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
        results = RunResults(
            tmp_path / "run",
            adapter=folder if kind == "adapter" else None,
            model=None if kind == "adapter" else folder,
            recipe={**RECIPE, **dict(recipe)} if recipe is not None else {},
            summary={**SUMMARY, **dict(summary)} if summary is not None else {},
            base=base,
        )
        return run_card(results, kind, folder, "me/tuned", base, **options)

    return card


FORMS = {
    "LoRA": {
        "kind": "adapter",
        "recipe": {"lora": LORA},
        "summary": {"lora": LORA["targets"]},
        "files": {"adapter_config.json": ADAPTER},
    },
    "ESFT": {"kind": "adapter", "recipe": {"esft": {"score": "token"}}},
    "preferences": {
        "kind": "adapter",
        "recipe": {"lora": LORA, "dpo": {"beta": 0.1}},
        "summary": {"lora": LORA["targets"]},
        "files": {"adapter_config.json": ADAPTER},
    },
    "whole model": {},
    "merged": {"recipe": {"lora": LORA}, "summary": {"lora": LORA["targets"]}},
    "with code": {"kind": "code"},
    "native": {"kind": "deepseek_v3", "files": {"config.json": {"model_type": "deepseek_v3"}}},
    "no run": {"recipe": None, "summary": None, "base": None},
    "nothing held out": {"summary": {"eval_loss_before": None, "eval_loss_after": None, "eval_rows": 0}},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_card_of_every_form_is_one_the_hub_takes_and_has_no_gaps(card, form):
    text = str(card(**FORMS[form]))
    again = ModelCard(text)
    assert problems(yaml.safe_load(again.data.to_yaml())) == []
    assert again.data.pipeline_tag == "text-generation" and "deepseek_moe" in again.data.tags
    assert not re.search(r"None|\{\{|\}\}|\{%|Undefined|nan|More Information", again.text)
    for part in ("# tuned", "## How to load it", "## Results", "## Limits", "## Licence"):
        assert f"\n{part}\n" in again.text
    assert "\n\n\n" not in again.text


@pytest.mark.parametrize("form", FORMS)
def test_every_line_of_code_in_a_card_is_one_that_can_be_typed(card, form):
    text = str(card(**FORMS[form]))
    verbs = typer.main.get_command(app).commands
    for language, code in re.findall(r"```(python|bash)\n(.*?)\n```", text, re.S):
        if language == "python":
            ast.parse(code)
            continue
        for line in code.splitlines():
            words = line.split("#")[0].split()
            assert words[0] in ("hf", "vllm", "python", "deepseek-moe"), line
            if words[0] == "deepseek-moe":
                verbs[words[1]].make_context(words[1], words[2:])


def test_the_metadata_says_what_the_run_was(card):
    data = card(**FORMS["LoRA"]).data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("deepseek-ai/DeepSeek-V2-Lite", "adapter")
    assert (data["library_name"], data["datasets"]) == ("peft", ["me/rows"])
    assert "lora" in data["tags"] and "license" not in data and "language" not in data
    (result,) = data["model-index"][0]["results"]
    assert result["dataset"] == {"type": "me/rows", "name": "me/rows, held-out rows", "split": "train"}
    assert {metric["type"]: metric["value"] for metric in result["metrics"]} == {"loss": 1.25, "perplexity": 3.4903}
    assert card().data.to_dict()["base_model_relation"] == "finetune"


def test_the_text_says_what_was_measured_and_on_what_machine(card):
    text = str(card(**FORMS["LoRA"]))
    assert "| loss on held-out rows (nats a learned token) | 2.500 | 1.250 |" in text
    assert "1,800 of [me/rows](https://huggingface.co/datasets/me/rows)" in text
    assert "LoRA | on attention, shared_experts; r 8, alpha 32" in text
    assert "4 on each device, 8 times" in text and "| learning rate | 0.0002 |" in text
    assert "NVIDIA H100 in 3,600 s (61.5 s a step), with at most 41.50 GB of memory; torch 2.13.0." in text
    assert "at most 512; longer rows were left out" in text


@pytest.mark.parametrize("value", [{"exact_match": 0.75}, 0.75], ids=["by name", "one number"])
def test_a_metric_of_the_recipe_is_in_table_and_index(card, value):
    before = {"exact_match": 0.25} if isinstance(value, dict) else 0.25
    made = card(summary={"metric_before": before, "metric_after": value})
    name = "exact_match" if isinstance(value, dict) else "score"
    assert f"| {name} | 0.2500 | 0.7500 |" in made.text
    metrics = made.data.to_dict()["model-index"][0]["results"][0]["metrics"]
    assert {"type": name, "value": 0.75, "name": name} in metrics


def test_the_recipe_in_a_card_can_be_run_again(card, tmp_path):
    text = str(card(**FORMS["LoRA"]))
    path = tmp_path / "again.yaml"
    path.write_text(re.search(r"```yaml\n(.*?)```", text, re.S)[1], encoding="utf-8")
    recipe = load_recipe(path, ["output_dir=elsewhere"])
    assert (recipe.model, recipe.data, recipe.seed) == (RECIPE["model"], "me/rows", 7)
    assert (recipe.lora, recipe.training["learning_rate"], recipe.long_rows) == (LORA, 2e-4, "skip")


def test_no_path_of_the_machine_is_in_a_card(card, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}")
    made = card(recipe={"data": str(rows), "eval_data": str(rows), "model": str(tmp_path)}, base=None)
    assert str(tmp_path) not in str(made) and "/home/me" not in str(made)
    assert "1,800 of `rows.jsonl`" in made.text
    data = made.data.to_dict()
    assert "datasets" not in data and "base_model" not in data


def test_pictures_are_shown_where_they_are(card):
    assert "(loss.png)" not in str(card())
    text = str(card(files={"loss.png": "", "experts.png": ""}))
    assert "](loss.png)" in text and "](experts.png)" in text


@pytest.mark.parametrize(
    "adapted, base_type, expected",
    [
        ("self_attn.q_proj", "deepseek_v2", "--to peft-per-expert"),
        ("self_attn.kv_b_proj", "deepseek_v2", "--to bf16 --adapter adapter"),
        ("self_attn.q_proj", "deepseek_moe", "--to deepseek_v3 --adapter adapter"),
    ],
    ids=["a server takes it", "kv_b_proj", "a base that servers know by another type"],
)
def test_serving_an_adapter_depends_on_what_it_adapts_and_on_its_base(card, adapted, base_type, expected):
    config = ADAPTER | {"target_modules": [adapted]}
    base_json = {**tiny_config("v3").to_dict(), "model_type": base_type}
    text = str(card("adapter", files={"adapter_config.json": config}, base_json=base_json))
    served = text.partition("**vLLM and SGLang.**")[2].partition("**A whole")[0].partition("## ")[0]
    assert expected in served


@pytest.mark.parametrize("base_type", ["deepseek_v2", "deepseek_v3", "kimi_k2", "deepseek_moe"])
@pytest.mark.parametrize(
    "targets, is_lost",
    [
        (r"(?:.*\.)?layers\.(?:(?:0|1)\.(?:self_attn\.q_proj))", False),
        (["model.layers.0.self_attn.o_proj"], False),
        (r"(?:.*\.)?layers\.(?:(?:1)\.(?:mlp\.shared_experts\.up_proj))", True),
        (["gate_proj", "q_proj"], True),
    ],
    ids=["attention", "attention by names", "shared experts", "names"],
)
def test_an_adapter_says_how_transformers_own_class_gets_all_of_it(card, base_type, targets, is_lost):
    base_json = {**tiny_config("v3").to_dict(), "model_type": base_type}
    text = str(
        card("adapter", files={"adapter_config.json": ADAPTER | {"target_modules": targets}}, base_json=base_json)
    )
    title = "**Transformers' own class and PEFT, without this package.**"
    assert (title in text) == (base_type in ("deepseek_v2", "deepseek_v3"))
    part = text.partition(title)[2].partition("\n**")[0]
    if part:
        assert ("--to peft-native" in part) == is_lost == ('PeftModel.from_pretrained(model, "native")' in part)
        assert ("It loads there as it is." in part) != is_lost


def test_a_model_that_no_server_knows_says_why(card):
    config = tiny_config("v3", router_dtype="model").to_dict()
    assert "They know no type that can express this model: router_dtype=" in str(card(files={"config.json": config}))


def test_the_licence_is_the_bases_and_never_made_up(card):
    header = "---\nlicense: other\nlicense_name: deepseek\nlicense_link: LICENSE-MODEL\n---\n# Base"
    licence = licence_of(header)
    assert licence == {"license": "other", "license_name": "deepseek", "license_link": "LICENSE-MODEL"}
    made = card(licence=licence)
    assert made.data.license_name == "deepseek" and "`deepseek` (LICENSE-MODEL)" in made.text
    assert licence_of("# no header") == licence_of("") == licence_of("---\nlicense: [\n---\n") == {}
    assert "Not stated by whoever published it" in card(licence={}).text
    with pytest.raises(UserError, match="license: 'Apache 2.0' is not a licence id such as apache-2.0"):
        card(licence={"license": "Apache 2.0"})


SOUND_RESULT = {
    "task": {"type": "t"},
    "dataset": {"type": "d", "name": "D"},
    "metrics": [{"type": "loss", "value": 1.0}],
}


@pytest.mark.parametrize(
    "fields, complaint",
    [
        ([], "not a YAML mapping"),
        ({"base_model": "/home/me/base"}, "base_model"),
        ({"base_model": ["me/base", "../base"]}, "base_model"),
        ({"license": ["mit"]}, "license"),
        ({"language": "English"}, "language"),
        ({"datasets": "rows of mine"}, "datasets"),
        ({"tags": "lora"}, "tags"),
        ({"pipeline_tag": "Text Generation"}, "pipeline_tag"),
        ({"base_model_relation": "child"}, "base_model_relation"),
        ({"model-index": {"name": "m"}}, "model-index"),
        ({"model-index": [{"results": []}]}, "no name"),
        ({"model-index": [{"name": "m", "results": [{**SOUND_RESULT, "dataset": {"type": "d"}}]}]}, "dataset.name"),
        ({"model-index": [{"name": "m", "results": [{**SOUND_RESULT, "metrics": []}]}]}, "metrics"),
        (
            {
                "model-index": [
                    {"name": "m", "results": [{**SOUND_RESULT, "metrics": [{"type": "x", "value": float("nan")}]}]}
                ]
            },
            "value",
        ),
    ],
    ids=lambda value: None if isinstance(value, str) else (json.dumps(value)[:40]),
)
def test_a_header_that_the_hub_refuses_is_found(fields, complaint):
    assert any(complaint in problem for problem in problems(fields))
    assert problems({"model-index": [{"name": "m", "results": [SOUND_RESULT]}], "license": "mit"}) == []


def test_the_local_hub_refuses_a_card_that_names_a_folder_as_base(tmp_path):
    with LocalHub(tmp_path / "hub") as hub:
        api = HfApi(endpoint=hub.endpoint, token="any")
        api.create_repo("me/model")
        card = b"---\nbase_model: /home/me/base\n---\n# A card\n"
        with pytest.raises(ValueError, match="base_model"):
            api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id="me/model")
        assert api.list_repo_files("me/model") == []
