"""What goes up is the model, the adapter or the run, and nothing else that lies or is linked beside it."""

import json
import os
import shutil
from pathlib import Path

import pytest
from peft import PeftConfig, get_peft_model
from tiny import tiny_config, tiny_model
from tiny_run import tiny_base, tiny_tokenizer, tiny_values

from modeling_deepseek_moe import CheckpointError, DeepseekMoeForCausalLM
from modeling_deepseek_moe.conversion.engine.beside import without_local_code
from modeling_deepseek_moe.finetune.errors import UserError
from modeling_deepseek_moe.finetune.hub.parts import is_beside_weights
from modeling_deepseek_moe.finetune.hub.upload import RECORD
from modeling_deepseek_moe.finetune.model.chosen_experts import train_chosen
from modeling_deepseek_moe.finetune.model.esft_adapter import save_esft_adapter
from modeling_deepseek_moe.finetune.model.lora import lora_config
from modeling_deepseek_moe.finetune.recipe.load import make_recipe
from modeling_deepseek_moe.finetune.train import one_run as train

KEY = b"-----BEGIN OPENSSH PRIVATE KEY-----"
OF_THE_HUB = {RECORD, "README.md"}
ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"}
ADAPTER |= {"chat_template.jinja"}
STRAYS = ("id_rsa", "train.log", "optimizer.pt", "rows.jsonl", ".env", "setup.py", "other.safetensors.bak", "notes.md")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    values = tiny_values(folder, tiny_base(folder / "base"), **{"training.max_steps": 1, "metric_rows": 1})
    train.run(make_recipe(values))
    return folder


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of a finished run, and a private key elsewhere."""
    shutil.copytree(trained / "run", tmp_path / "run")
    (tmp_path / "key").write_bytes(KEY)
    return tmp_path / "run"


def pulled(api, name: str, tmp_path: Path) -> dict[str, bytes]:
    back = Path(api.snapshot_download(name, local_dir=tmp_path / "back"))
    paths = [path for path in back.rglob("*") if path.is_file() and ".cache" not in path.parts]
    return {path.relative_to(back).as_posix(): path.read_bytes() for path in paths}


def test_stray_files_stay_here_and_are_named(run, push, api, tmp_path, capsys):
    for folder in (run, run / "adapter"):
        for name in STRAYS:
            (folder / name).write_bytes(KEY)
    (run / "adapter" / "secrets").mkdir()
    (run / "adapter" / "secrets" / "tokenizer.json").write_bytes(KEY)
    (run / "adapter" / "LICENSE").write_text("Apache-2.0")
    push(run, "me/tuned")
    files = pulled(api, "me/tuned", tmp_path)
    assert files.keys() == {*OF_THE_HUB, *ADAPTER, "LICENSE", "loss.png", "experts.png"}
    assert not any(KEY in content for content in files.values())
    said = " ".join(capsys.readouterr().out.split())
    assert f"not pushed, for they are no part of adapter: {', '.join(sorted((*STRAYS, 'secrets')))}" in said


@pytest.mark.parametrize(
    "name", ["adapter/tokenizer.json", "adapter/LICENSE", "adapter/adapter_config.json", "README.md", "loss.png"]
)
def test_a_link_is_refused_by_name(run, push, api, name):
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(run.parent / "key")
    with pytest.raises((UserError, CheckpointError), match=rf"{Path(name).name} is a link"):
        push(run, "me/tuned")
    assert not api.repo_exists("me/tuned")
    assert not list(run.parent.glob("*.aside"))


def test_a_folder_that_is_a_link_is_refused_too(run, push, api):
    os.rename(run / "adapter", run.parent / "elsewhere")
    (run / "adapter").symlink_to(run.parent / "elsewhere")
    with pytest.raises(UserError, match="adapter is a link, to .*elsewhere: nothing is pushed"):
        push(run, "me/tuned")
    assert not api.repo_exists("me/tuned")


def test_a_run_under_a_linked_folder_is_pushed(run, push, api, tmp_path):
    (tmp_path / "linked").symlink_to(run.parent)
    push(tmp_path / "linked" / "run", "me/tuned")
    assert set(api.list_repo_files("me/tuned")) >= ADAPTER


def test_a_base_on_this_machine_is_nobodys_base_elsewhere(trained, run, push, api, tmp_path, capsys):
    assert PeftConfig.from_pretrained(run / "adapter").base_model_name_or_path == str(trained / "base")
    push(run, "me/tuned")
    files = pulled(api, "me/tuned", tmp_path)
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] is None
    assert PeftConfig.from_pretrained(tmp_path / "back").base_model_name_or_path is None
    for name, content in files.items():
        assert str(trained).encode() not in content and str(tmp_path).encode() not in content, name
    assert f"Others do not have {trained / 'base'}, which the adapter is for" in " ".join(
        capsys.readouterr().out.split()
    )


def test_paths_in_the_recipe_are_names_on_the_card(trained, tmp_path, push, api):
    choice = tmp_path / "choices" / "expert_cfg.json"
    choice.parent.mkdir()
    choice.write_text('{"experts": {"1": [0, 1]}}')
    values = tiny_values(tmp_path, trained / "base", **{"training.max_steps": 1, "esft.experts": str(choice)})
    values = {key: value for key, value in values.items() if not key.startswith("lora.")}
    train.run(make_recipe(values))
    push(tmp_path / "run", "me/esft")
    files = pulled(api, "me/esft", tmp_path)
    assert b"experts: expert_cfg.json" in files["README.md"]
    assert {"expert_cfg.json", "model.safetensors", "tokenizer.json"} <= files.keys()
    assert not any(str(tmp_path).encode() in content for content in files.values())


def test_of_a_model_its_shards_and_no_others_go_up(sharded, push, api):
    shutil.copy(sharded / "model-00001-of-00003.safetensors", sharded / "old.safetensors")
    (sharded / "modeling_old.py").write_text("raise SystemExit")
    fields = json.loads((sharded / "config.json").read_text())
    code = {"AutoModelForCausalLM": "modeling_old.Old", "AutoConfig": "me/code--modeling.Config"}
    (sharded / "config.json").write_text(json.dumps(fields | {"auto_map": code}))
    (sharded / "additional_chat_templates").mkdir()
    (sharded / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    push(sharded, "me/model")
    files = set(api.list_repo_files("me/model"))
    shards = {f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)}
    assert shards <= files and "model.safetensors.index.json" in files and "generation_config.json" in files
    assert "additional_chat_templates/tools.jinja" in files
    assert not any(name.endswith(".py") or name == "old.safetensors" for name in files)
    config = json.loads(Path(api.hf_hub_download("me/model", "config.json")).read_bytes())
    assert config["auto_map"] == {"AutoConfig": "me/code--modeling.Config"}
    assert json.loads((sharded / "config.json").read_text())["auto_map"] == code


def test_adapters_of_both_kinds_load_from_what_was_pushed(tmp_path, push, api):
    model = tiny_model(tiny_config("v3"))
    train_chosen(model, {"experts": {"1": [1]}, "shared_experts": False, "non_expert_modules": False})
    save_esft_adapter(model, tmp_path / "esft")
    base = DeepseekMoeForCausalLM.from_pretrained(tiny_base(tmp_path / "base"))
    get_peft_model(base, lora_config(base, ["attention"])).save_pretrained(tmp_path / "lora")
    tiny_tokenizer().save_pretrained(tmp_path / "lora")
    for name, expected in (("esft", {"expert_cfg.json", "model.safetensors"}), ("lora", ADAPTER)):
        (tmp_path / name / "training_args.bin").write_bytes(KEY)
        push(tmp_path / name, f"me/{name}")
        assert set(api.list_repo_files(f"me/{name}")) == {*OF_THE_HUB, *expected}


@pytest.mark.parametrize(
    "name, expected",
    [
        ("tokenizer.json", True),
        ("tiktoken.model", True),
        ("sentencepiece.bpe.model", True),
        ("additional_chat_templates/tool_use.jinja", True),
        ("LICENSE", True),
        ("LICENSE-MODEL", True),
        ("Licence.txt", True),
        ("NOTICE", True),
        ("license.key", False),
        ("license.py", False),
        ("secret/tokenizer.json", False),
        ("additional_chat_templates/../key.jinja", False),
        ("vocab.bin", False),
        ("id_rsa", False),
    ],
)
def test_what_belongs_beside_weights_goes_by_its_name(name, expected):
    assert is_beside_weights(name) == expected


def test_a_config_without_code_stays_as_it_is():
    assert without_local_code({"a": 1}) == {"a": 1}
    assert without_local_code({"a": 1, "auto_map": {"AutoModel": "model.Model"}}) == {"a": 1}
    assert without_local_code({"auto_map": None}) == {}
