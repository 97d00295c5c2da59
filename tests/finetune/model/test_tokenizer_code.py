"""Tokenizers that are code: run only where one says so, by every verb, and nothing else of the repository."""

import json
import shutil
import subprocess
import sys

import pytest
from huggingface_hub import HfApi
from places import SUPPORT
from tiktoken_folder import SOURCE, tiktoken_folder, tiktoken_model
from tiny_run import tiny_tokenizer, write_jsonl
from transformers import AutoTokenizer
from typer.testing import CliRunner

from modeling_deepseek_moe.cli.main import app
from modeling_deepseek_moe.finetune.data.rows import load_data
from modeling_deepseek_moe.finetune.demo.local_hub import LocalHub
from modeling_deepseek_moe.finetune.errors import UserError
from modeling_deepseek_moe.finetune.hub.push import push_run
from modeling_deepseek_moe.finetune.model.tokenizer import check_tokenizer, load_tokenizer

ROWS = [
    {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i} ok"}]} for i in range(8)
]
# Its pattern cannot be known without running it.
OBSCURE = SOURCE.replace('"|".join(', 'str("|").join(')
VERBS = {
    "evaluate": lambda model, data, out: ["evaluate", model, "--data", data, "--limit", "2", "--output", out],
    "chat": lambda model, data, out: ["chat", model, "--greedy", "--max-new-tokens", "2"],
    "experts": lambda model, data, out: ["experts", model, data, "--output", out],
    "esft score": lambda model, data, out: ["esft", "score", model, data, "--output", f"{out}.json"],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiktoken_model(tmp_path_factory.mktemp("obscure"), source=OBSCURE)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", ROWS)


def call(*arguments, said="Hello\n"):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=said)


def finetune(model, data, out, *more):
    keys = {"model": model, "data": data, "output_dir": out, "eval_fraction": 0.25, "training.max_steps": 1}
    return call("finetune", "lora_attention", *(f"{key}={value}" for key, value in keys.items()), *more)


@pytest.mark.usefixtures("metric_cache")
@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_runs_the_code_only_if_told_to(model, data, tmp_path, verb):
    arguments = VERBS[verb](model, data, tmp_path / "out")
    refused = call(*arguments)
    assert refused.exit_code == 1
    assert len(refused.stderr.splitlines()) == 1
    assert "tokenization_kimi.py" in refused.stderr and "(--trust-remote-code)" in refused.stderr
    done = call(*arguments, "--trust-remote-code")
    assert done.exit_code == 0, done.output


def test_a_run_trains_with_the_code_and_its_results_bring_it_along(model, data, tmp_path):
    refused = finetune(model, data, tmp_path / "run")
    assert refused.exit_code == 1 and "`trust_remote_code: true`" in refused.stderr
    assert not (tmp_path / "run").exists()
    done = finetune(model, data, tmp_path / "run", "trust_remote_code=true", "merge=true")
    assert done.exit_code == 0, done.output
    saved = load_tokenizer(tmp_path / "run" / "model", trust_remote_code=True)
    assert saved("Hello")["input_ids"] == load_tokenizer(model, trust_remote_code=True)("Hello")["input_ids"]
    # A push with the model's code keeps that of the tokenizer, and its card says how to load it.
    with LocalHub(tmp_path / "hub") as hub:
        push_run(tmp_path / "run", "me/tuned", with_code=True, endpoint=hub.endpoint, token="any")
        api = HfApi(endpoint=hub.endpoint, token="any")
        folder = tmp_path / "back"
        api.snapshot_download("me/tuned", local_dir=folder)
    assert {"tokenization_kimi.py", "modeling_deepseek_moe.py"} <= {path.name for path in folder.glob("*.py")}
    assert 'AutoTokenizer.from_pretrained("me/tuned", trust_remote_code=True)' in (folder / "README.md").read_text()
    assert AutoTokenizer.from_pretrained(folder, trust_remote_code=True)("Hello") == saved("Hello")


def test_a_run_on_tiktokens_files_needs_no_code_and_leaves_an_ordinary_tokenizer(data, tmp_path):
    """The two reserved tokens that Kimi's code makes beyond the vocabulary are no reason to refuse it either."""
    model = tiktoken_model(tmp_path / "kimi")
    done = finetune(model, data, tmp_path / "run")
    assert done.exit_code == 0, done.output
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "adapter")
    assert tokenizer.is_fast and tokenizer.chat_template
    assert tokenizer("Hello, 世界")["input_ids"] == load_tokenizer(model)("Hello, 世界")["input_ids"]
    vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
    code = load_tokenizer(model, trust_remote_code=True)
    assert len(code) == vocab_size + 2
    check_tokenizer(code, vocab_size, "it")
    with pytest.raises(UserError, match="they do not belong together"):
        check_tokenizer(code, vocab_size - 1, "it")


def test_of_the_model_no_code_is_run(tmp_path):
    """Neither that of its config, which transformers would look for on the way to a tokenizer, nor its own."""
    folder = tiktoken_model(tmp_path / "kimi")
    ran = tmp_path / "ran"
    for name in ("configuration_kimi", "modeling_kimi"):
        (folder / f"{name}.py").write_text(f"open({str(ran)!r}, 'w')\nclass Kimi: pass\n")
    fields = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "configuration_kimi.Kimi", "AutoModelForCausalLM": "modeling_kimi.Kimi"}
    (folder / "config.json").write_text(json.dumps({**fields, "model_type": "kimi_other", "auto_map": code}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**json.loads((folder / "tokenizer_config.json").read_text()), "auto_map": None})
    )
    tiny_tokenizer().save_pretrained(folder)
    assert load_tokenizer(folder, trust_remote_code=True)("w1")["input_ids"]
    (folder / "config.json").write_text(json.dumps({**fields, "auto_map": code}))
    shutil.rmtree(tmp_path / "other", ignore_errors=True)
    other, _ = tiktoken_folder(tmp_path / "other")
    for path in (folder / "config.json", *folder.glob("*_kimi.py")):
        if not path.name.startswith("tokenization"):
            shutil.copy(path, other)
    load_tokenizer(other, trust_remote_code=True)
    load_tokenizer(other)
    assert not ran.exists()


def test_without_code_the_key_changes_nothing(base, data, tmp_path):
    plain, trusting = (load_tokenizer(base, trust_remote_code=trust) for trust in (False, True))
    assert plain.get_vocab() == trusting.get_vocab() and type(plain) is type(trusting)


def test_code_in_another_repository_is_refused_by_name(tmp_path):
    folder, _ = tiktoken_folder(tmp_path, auto_map={"AutoTokenizer": ["else/where--tokenization_kimi.T", None]})
    with pytest.raises(UserError, match=r"its tokenizer is code \(else/where--tokenization_kimi.py\), which is not"):
        load_tokenizer(folder)


def test_a_code_without_tiktokens_files_is_refused_as_code(tmp_path):
    folder, _ = tiktoken_folder(tmp_path)
    (folder / "tiktoken.model").unlink()
    with pytest.raises(UserError, match=r"its tokenizer is code \(tokenization_kimi.py\), which is not run unasked"):
        load_tokenizer(folder)


def test_rows_are_read_again_when_the_code_has_changed(tmp_path):
    """A tokenizer in Python may cut texts otherwise with the same vocabulary."""
    path = str(write_jsonl(tmp_path / "rows.jsonl", [{"text": "one two"}]))
    found = []
    other = OBSCURE.replace("        found = []", '        found = ["[UNK]"]')
    for name, source in (("one", OBSCURE), ("other", other)):
        tokenizer = load_tokenizer(tiktoken_folder(tmp_path / name, source=source)[0], trust_remote_code=True)
        found.append(load_data(path, "train", tokenizer, 64, tmp_path / "cache")[0]["input_ids"])
    assert len(found[1]) == len(found[0]) + 1


FROM_HUB = """
import sys
from modeling_deepseek_moe.finetune.model.tokenizer import load_tokenizer
from modeling_deepseek_moe.finetune.errors import UserError
tokenizer = load_tokenizer("me/kimi")
print(tokenizer("Hello")["input_ids"], tokenizer.name_or_path, bool(tokenizer.chat_template))
print(load_tokenizer("me/kimi", trust_remote_code=True)("Hello")["input_ids"])
try:
    load_tokenizer("me/absent")
except UserError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_tokenizer_of_the_hub_is_read_by_its_name(tmp_path):
    folder = tiktoken_model(tmp_path / "kimi")
    with LocalHub(tmp_path / "hub") as hub:
        api = HfApi(endpoint=hub.endpoint, token="any")
        api.create_repo("me/kimi")
        api.upload_folder(repo_id="me/kimi", folder_path=folder)
        done = subprocess.run(
            [sys.executable, "-c", FROM_HUB],
            env={**hub.environment(tmp_path / "home"), "PYTHONPATH": str(SUPPORT)},
            capture_output=True,
            text=True,
            timeout=240,
        )
    assert done.returncode == 0, done.stderr
    read, run, absent = done.stdout.splitlines()
    ids = load_tokenizer(folder)("Hello")["input_ids"]
    assert read == f"{ids} me/kimi True" and run == f"{ids}"
    assert absent.startswith("cannot load model 'me/absent': ")
