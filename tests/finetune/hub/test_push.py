"""Publishing what a run left: every kind loads by its name, stopped uploads go on, and nothing is overwritten."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model
from tiny import tiny_ids
from tiny_run import HUB_TOKEN, tiny_base, tiny_values

from modeling_deepseek_moe import CheckpointError, DeepseekMoeForCausalLM
from modeling_deepseek_moe.conversion import convert
from modeling_deepseek_moe.finetune.errors import UserError
from modeling_deepseek_moe.finetune.hub.upload import RECORD
from modeling_deepseek_moe.finetune.model.lora import lora_config
from modeling_deepseek_moe.finetune.recipe.load import make_recipe
from modeling_deepseek_moe.finetune.train import one_run as train

# Without the package first, then with it: the logits of what each repository holds.
LOADED_BY_NAME = """
import sys
sys.modules["modeling_deepseek_moe"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
ids, logits = torch.load(sys.argv[1]), {}
code = AutoModelForCausalLM.from_pretrained("me/code", trust_remote_code=True)
native = AutoModelForCausalLM.from_pretrained("me/native")
assert type(code).__module__.startswith("transformers_modules.") and type(native).__name__ == "DeepseekV3ForCausalLM"
del sys.modules["modeling_deepseek_moe"]
from peft import PeftModel, get_peft_model
from modeling_deepseek_moe import DeepseekMoeForCausalLM
from modeling_deepseek_moe.expert_lora import load_adapter
base = lambda: DeepseekMoeForCausalLM.from_pretrained("me/base")
models = {
    "code": code,
    "native": native,
    "merged": AutoModelForCausalLM.from_pretrained("me/merged"),
    "adapter": load_adapter(base(), "me/adapter"),
    "adapter, PEFT": PeftModel.from_pretrained(base(), "me/adapter"),
}
for name, model in models.items():
    with torch.no_grad():
        logits[name] = model.eval()(ids).logits.float()
for name in ("adapter", "merged", "native", "code"):
    assert AutoTokenizer.from_pretrained(f"me/{name}").chat_template
torch.save(logits, sys.argv[2])
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of two steps with adapters on everything, on a base in a folder."""
    folder = tmp_path_factory.mktemp("run")
    base = tiny_base(folder / "base")
    (base / "README.md").write_text("---\nlicense: mit\n---\n# A base\n", encoding="utf-8")
    # Large enough to see whether the adapter was applied.
    values = tiny_values(folder, base, **{"training.max_steps": 2, "training.learning_rate": 0.05})
    train.run(make_recipe(values))
    return folder / "run"


@pytest.fixture(scope="module")
def expected(run):
    """Token ids, and the logits of base and adapter."""
    base = DeepseekMoeForCausalLM.from_pretrained(run.parent / "base")
    ids = tiny_ids(base.config)
    with torch.no_grad():
        unadapted = base(ids).logits
        logits = PeftModel.from_pretrained(base, run / "adapter").eval()(ids).logits
    assert not torch.allclose(unadapted, logits, atol=1e-2)
    return ids, logits


def assert_same(logits, expected, name):
    # B A x added to the output or to the weight: float32 rounding of logits of about 10.
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4, msg=lambda text: f"{name}: {text}")


@pytest.mark.slow
def test_every_kind_loads_by_its_name_and_computes_what_was_trained(run, hub, push, api, expected, tmp_path, capsys):
    api.create_repo("me/base")
    api.upload_folder(repo_id="me/base", folder_path=run.parent / "base")
    kinds = {"adapter": {"base": "me/base"}, "merged": {"merged": True}, "native": {"native": "deepseek_v3"}}
    for name, options in (kinds | {"code": {"with_code": True}}).items():
        assert push(run, f"me/{name}", **options) == f"{hub.endpoint}/me/{name}"
    printed = capsys.readouterr().out
    assert 'load_adapter(model, "me/adapter")' in printed and "trust_remote_code=True" in printed
    assert "adapter_model.safetensors" in printed and "kB" in printed and HUB_TOKEN not in printed

    ids, adapted = expected
    torch.save(ids, tmp_path / "ids.pt")
    done = subprocess.run(
        [sys.executable, "-c", LOADED_BY_NAME, str(tmp_path / "ids.pt"), str(tmp_path / "logits.pt")],
        env={**hub.environment(tmp_path / "home"), "HF_TOKEN": HUB_TOKEN},  # they are private
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    for name, logits in torch.load(tmp_path / "logits.pt").items():
        assert_same(logits, adapted, name)


KINDS = {
    "merged": ({"merged": True}, "deepseek_moe"),
    "native": ({"native": "deepseek_v3"}, "deepseek_v3"),
    "with code": ({"with_code": True}, "deepseek_moe"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_was_merged_for_the_push_is_the_one_that_was_trained(run, push, api, expected, tmp_path, kind):
    options, model_type = KINDS[kind]
    push(run, "me/model", **options)
    back = api.snapshot_download("me/model", local_dir=tmp_path / "back")
    fields = json.loads((tmp_path / "back" / "config.json").read_bytes())
    assert fields["model_type"] == model_type
    code = {path.name for path in (tmp_path / "back").glob("*.py")}
    if kind == "with code":
        assert fields["auto_map"]["AutoModelForCausalLM"] == "modeling_deepseek_moe.DeepseekMoeForCausalLM"
        assert {"modeling_deepseek_moe.py", "configuration_deepseek_moe.py", "experts.py"} <= code
    else:
        assert not code and "auto_map" not in fields
    ids, adapted = expected
    with torch.no_grad():
        assert_same(DeepseekMoeForCausalLM.from_pretrained(back)(ids).logits, adapted, kind)


def test_a_repository_has_the_card_the_pictures_and_no_path_of_this_machine(run, push, api, tmp_path):
    push(run, "me/tuned", base="me/base")
    back = Path(api.snapshot_download("me/tuned", local_dir=tmp_path / "back"))
    files = {path.name for path in back.iterdir() if path.is_file()}
    assert files == {"loss.png", "experts.png", RECORD, *(path.name for path in (run / "adapter").iterdir())}
    data = ModelCard.load(back / "README.md").data
    assert (data.base_model, data.library_name, data.license) == ("me/base", "peft", "mit")
    assert json.loads((back / "adapter_config.json").read_bytes())["base_model_name_or_path"] == "me/base"
    for name in files:
        assert str(run.parent).encode() not in (back / name).read_bytes(), name
    # The run itself is as it was, and nothing is left beside it.
    assert json.loads((run / "adapter" / "adapter_config.json").read_bytes())["base_model_name_or_path"] != "me/base"
    assert not list(run.parent.glob("*.aside"))


@pytest.mark.parametrize("words, is_said", [(["shared_experts"], True), (["attention"], False)], ids=["lost", "whole"])
def test_what_transformers_own_class_would_lose_is_said_when_an_adapter_is_pushed(
    words, is_said, push, api, tmp_path, capsys
):
    own = tiny_base(tmp_path / "own", num_nextn_predict_layers=0)
    convert(own, tmp_path / "base", "deepseek_v3")
    model = DeepseekMoeForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(model, lora_config(model, words)).save_pretrained(tmp_path / "run")
    push(tmp_path / "run", "me/adapter", base="me/base")
    said = capsys.readouterr().out
    assert ("drops LoRA on shared experts and dense layers without a word" in said) == is_said
    card = Path(api.hf_hub_download("me/adapter", "README.md", local_dir=tmp_path / "back")).read_text("utf-8")
    assert "Transformers' own class and PEFT" in card and ("--to peft-native" in card) == is_said


def test_a_card_that_somebody_wrote_is_pushed_as_it_is(run, push, api, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# By hand\n", encoding="utf-8")
    push(copy, "me/tuned")
    card = Path(api.hf_hub_download("me/tuned", "README.md", local_dir=tmp_path / "back")).read_text(encoding="utf-8")
    assert "By hand" in card and "cc-by-4.0" in card


def test_another_model_is_not_overwritten_unless_that_is_asked_for(run, sharded, push, api):
    api.create_repo("me/thesis", private=True)
    api.upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id="me/thesis")
    with pytest.raises(UserError, match=r"me/thesis holds something that deepseek-moe did not push \(config.json\)"):
        push(run, "me/thesis")
    assert api.list_repo_files("me/thesis") == ["config.json"]

    push(sharded, "me/thesis", force=True)
    assert "model.safetensors.index.json" in api.list_repo_files("me/thesis")
    with pytest.raises(UserError, match="me/thesis holds the model of another run"):
        push(run, "me/thesis")
    push(run, "me/thesis", force=True)
    files = api.list_repo_files("me/thesis")
    assert "adapter_config.json" in files and "config.json" not in files
    assert not any(name.startswith("model") for name in files)
    with pytest.raises(UserError, match="me/thesis holds this run too, but as adapter"):
        push(run, "me/thesis", merged=True)
    push(run, "me/thesis")


def test_weights_of_an_earlier_push_of_the_same_run_go_and_other_files_stay(run, push, api):
    push(run, "me/tuned")
    for name in ("adapter_model-00001-of-00002.safetensors", "picture.png"):
        api.upload_file(path_or_fileobj=b"0", path_in_repo=name, repo_id="me/tuned")
    push(run, "me/tuned")
    files = api.list_repo_files("me/tuned")
    assert "picture.png" in files and "adapter_model-00001-of-00002.safetensors" not in files


def test_who_sees_a_repository_is_never_changed_in_silence(run, push, api):
    push(run, "me/tuned", private=False)
    assert not api.model_info("me/tuned").private
    with pytest.raises(UserError, match="me/tuned is public already"):
        push(run, "me/tuned", private=True)
    push(run, "me/tuned")
    push(run, "me/hidden")
    assert api.model_info("me/hidden").private


def test_a_stopped_push_says_how_to_go_on_and_does_not_merge_again(run, push, api, monkeypatch):
    merged = run.parent / "run.push.aside" / "weights" / "model.safetensors"
    written = set()
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.HfApi.upload_folder", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt, match=r"the same command goes on with what is in .*run.push.aside"):
                push(run, "me/model", merged=True)
            written.add((merged.stat().st_ino, merged.stat().st_mtime_ns))
    assert len(written) == 1
    push(run, "me/model", merged=True)
    assert not list(run.parent.glob("*.aside"))
    with pytest.raises(UserError, match="not a licence id"):
        push(run, "me/other", license="Apache 2.0")
    assert not api.repo_exists("me/other")


def test_a_model_that_the_type_cannot_express_is_refused_by_field(tmp_path, push, api):
    model = DeepseekMoeForCausalLM.from_pretrained(tiny_base(tmp_path / "v1", "v1"))
    get_peft_model(model, lora_config(model, ["attention"])).save_pretrained(tmp_path / "run")
    with pytest.raises(CheckpointError, match="scoring_func='softmax' cannot be expressed as deepseek_v3"):
        push(tmp_path / "run", "me/model", native="deepseek_v3")
    assert not api.repo_exists("me/model")
    assert not list(tmp_path.glob("*.aside"))
