"""`--device-map`: models whose parts lie elsewhere, also on disk, give the results of one that is all in memory."""

import gc
import json
import tempfile
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from tiny import tiny_ids
from tiny_run import counting_rows, tiny_base, write_jsonl
from typer.testing import CliRunner

from modeling_deepseek_moe import DeepseekMoeForCausalLM
from modeling_deepseek_moe.cli.main import app
from modeling_deepseek_moe.finetune.errors import UserError
from modeling_deepseek_moe.finetune.model.lora import lora_config
from modeling_deepseek_moe.finetune.model.use import load_for_use, read_device_map

IN_MEMORY = ("model.embed_tokens", "model.rotary_emb")
ON_DISK = {**dict.fromkeys(IN_MEMORY, "cpu"), **dict.fromkeys(("model.layers", "model.norm", "lm_head"), "disk")}
ONE_ON_DISK = {**ON_DISK, **{f"model.layers.{layer}": "cpu" for layer in (0, 2)}, "model.layers.1": "disk"}
MAPS = {
    "auto": "auto",
    "a device": "cpu",
    "a map": '{"": "cpu"}',
    "layers on disk": json.dumps(ON_DISK),
    "one layer on disk": json.dumps({name: place for name, place in ONE_ON_DISK.items() if name != "model.layers"}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("device_map")


@pytest.fixture(scope="module", params=["v1", "v2_lite", "moonlight"])
def base(request, folder) -> Path:
    return tiny_base(folder / request.param, request.param)


@pytest.fixture(scope="module")
def v3(folder) -> Path:
    return tiny_base(folder / "base", "v3", initializer_range=0.5)


@pytest.fixture(scope="module")
def rows(folder) -> Path:
    return write_jsonl(folder / "rows.jsonl", counting_rows("prompt", 6))


@pytest.fixture(autouse=True)
def offloads(tmp_path, monkeypatch) -> Path:
    """The folder of temporary ones."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path / "temporary"


def call(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.mark.parametrize("name", MAPS)
@torch.inference_mode()
def test_logits_and_decoded_tokens_are_equal(base, name):
    plain, _ = load_for_use(base)
    placed, _ = load_for_use(base, device_map=MAPS[name])
    assert any(p.is_meta for p in placed.parameters()) == ("disk" in name)
    ids = tiny_ids(plain.config)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 2}
    assert torch.equal(placed(ids).logits, plain(ids).logits)
    # Decoding reads the latent cache in the absorbed form, with the weight of `kv_b_proj` alone. Where a weight begins
    # in memory, which differs from call to call, decides in which order a product of one row adds up.
    found, expected = (
        model.generate(ids, output_logits=True, return_dict_in_generate=True, **options) for model in (placed, plain)
    )
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@torch.inference_mode()
def test_the_dtype_is_the_one_that_was_asked_for(base, dtype):
    plain, placed = (load_for_use(base, dtype, device_map=each)[0] for each in (None, MAPS["layers on disk"]))
    ids = tiny_ids(plain.config)
    assert placed(ids).logits.dtype == plain(ids).logits.dtype == getattr(torch, dtype)
    assert torch.equal(placed(ids).logits, plain(ids).logits)


def test_what_was_put_on_disk_goes_with_the_model(v3, offloads):
    model, _ = load_for_use(v3, device_map=MAPS["layers on disk"])
    assert any(offloads.iterdir())
    del model
    gc.collect()
    assert not any(offloads.iterdir())


def test_evaluate_measures_the_same(v3, rows, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i % 70}" for i in range(200)))
    found = {}
    for name in (None, "auto", "layers on disk"):
        options = ["--device-map", MAPS[name]] if name else []
        result = call("evaluate", v3, "--text", text, "--data", rows, "--output", tmp_path / str(name), *options)
        assert result.exit_code == 0, result.output
        found[name] = json.loads((tmp_path / str(name) / "evaluation.json").read_text())["after"]
    assert found[None] == found["auto"] == found["layers on disk"]


def test_experts_counts_the_same(v3, rows, tmp_path):
    found = {}
    for name in (None, "auto", "layers on disk"):
        options = ["--device-map", MAPS[name]] if name else []
        result = call("experts", v3, rows, "--output", tmp_path / str(name), *options)
        assert result.exit_code == 0, result.output
        found[name] = json.loads((tmp_path / str(name) / "experts.json").read_text())["layers"]
    assert found[None] == found["auto"] == found["layers on disk"]


def test_esft_score_scores_the_same(v3, rows, tmp_path):
    found = {}
    for name in (None, "layers on disk"):
        options = ["--device-map", MAPS[name]] if name else []
        result = call("esft", "score", v3, rows, "--output", tmp_path / f"{name}.json", *options)
        assert result.exit_code == 0, result.output
        found[name] = json.loads((tmp_path / f"{name}.json").read_text())
    assert found[None] == found["layers on disk"]


def test_chat_says_the_same(v3):
    said = [
        CliRunner()
        .invoke(app, ["chat", str(v3), "--greedy", "--max-new-tokens", "6", *options], input="w1 w2\n")
        .stdout
        for options in ([], ["--device-map", MAPS["layers on disk"]])
    ]
    assert said[0] == said[1] and said[0].strip()


@pytest.fixture(scope="module")
def adapter(folder, v3) -> Path:
    model = DeepseekMoeForCausalLM.from_pretrained(v3)
    get_peft_model(model, lora_config(model, ["all"], r=2)).save_pretrained(folder / "adapter")
    return folder / "adapter"


@torch.inference_mode()
def test_an_adapter_goes_on_a_model_that_is_all_in_memory(v3, adapter):
    models = [load_for_use(v3, adapter=adapter, device_map=each)[0] for each in (None, "auto")]
    ids = tiny_ids(models[0].config)
    assert torch.equal(models[0](ids).logits, models[1](ids).logits)


@pytest.mark.parametrize("verb", ["evaluate", "experts"])
def test_an_adapter_over_weights_on_disk_is_refused_with_the_way_out(v3, adapter, rows, tmp_path, verb):
    arguments = ["evaluate", v3, "--data", rows] if verb == "evaluate" else ["experts", v3, rows]
    options = ["--adapter", adapter, "--device-map", MAPS["layers on disk"], "--output", tmp_path / "out"]
    result = call(*arguments, *options)
    assert (result.exit_code, len(result.stderr.splitlines()[-1:])) == (1, 1)
    last = result.stderr.splitlines()[-1]
    assert "--device-map keeps off their device" in last and f"--adapter {adapter}" in last


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpu", "names 'gpu', which is no device"),
        ("cuda:99", "names 'cuda:99', which is no device"),
        ('{"": "somewhere"}', "names 'somewhere', which is no device"),
        ('{"": ["cpu"]}', "a module goes to a device or to disk"),
        ('{"": true}', "a module goes to a device or to disk"),
        ("{cpu}", "is no JSON object"),
        ("[1]", "which is no device"),
    ],
)
def test_a_wrong_map_is_one_line(v3, text, message):
    with pytest.raises(UserError, match="--device-map") as caught:
        load_for_use(v3, device_map=text)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "places", [{"model.embed_tokens": "cpu", "model.layers": "disk"}, {"model": "disk", "lm_head": "cpu"}, {}]
)
def test_a_map_that_leaves_out_a_part_or_computes_nowhere_is_one_line(v3, places, offloads):
    with pytest.raises(UserError) as caught:
        load_for_use(v3, device_map=json.dumps(places))
    assert "\n" not in str(caught.value)
    assert not any(offloads.iterdir())


def test_words_are_left_to_accelerate():
    assert read_device_map("auto") == "auto" and read_device_map("balanced") == "balanced"
    assert read_device_map("cpu") == {"": "cpu"}
