"""The local Hub, spoken to by the real `huggingface_hub` client over HTTP."""

import hashlib
import json
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import load_file, save_file
from tiny_run import HUB_TOKEN

from modeling_deepseek_moe.finetune.demo.local_hub import LocalHub

DIGEST = hashlib.sha256(b"something").hexdigest()


@pytest.fixture
def hub(tmp_path):
    with LocalHub(tmp_path / "hub") as hub:
        yield hub


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    save_file({"weight": torch.arange(4096.0)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "deepseek_moe"}')
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A card\n")
    (folder / "sub" / "notes.txt").write_text("nested")
    return folder


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".cache" not in path.parts
    }


def run_python(code, hub, home, *arguments):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=hub.environment(home),
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_a_folder_comes_back_as_it_went_up(api, folder, tmp_path):
    assert api.create_repo("me/model").repo_id == "me/model"
    api.upload_folder(repo_id="me/model", folder_path=folder)
    back = api.snapshot_download("me/model", local_dir=tmp_path / "back")
    assert contents(tmp_path / "back") == contents(folder)
    assert str(tmp_path / "back") == back
    assert sorted(api.list_repo_files("me/model")) == sorted(contents(folder))


def test_safetensors_travel_by_lfs_when_asked(folder, tmp_path):
    code = """
import sys
from huggingface_hub import HfApi
api = HfApi(token="local")
api.create_repo("me/large", private=True)
api.upload_folder(repo_id="me/large", folder_path=sys.argv[1])
rows = {row.path: row.lfs for row in api.list_repo_tree("me/large") if hasattr(row, "lfs")}
assert rows["model.safetensors"].size > 16384 and rows["config.json"] is None, rows
again = api.upload_folder(repo_id="me/large", folder_path=sys.argv[1])
assert again.oid == api.model_info("me/large").sha
api.snapshot_download("me/large", local_dir=sys.argv[2])
"""
    with LocalHub(tmp_path / "hub", lfs=True) as hub:
        done = run_python(code, hub, tmp_path / "home", folder, tmp_path / "back")
    assert done.returncode == 0, done.stderr
    weight = load_file(tmp_path / "back" / "model.safetensors")["weight"]
    assert torch.equal(weight, torch.arange(4096.0))


def test_a_model_loads_by_name_in_a_fresh_process(hub, api, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "tiny")
    api.create_repo("me/tiny")
    api.upload_folder(repo_id="me/tiny", folder_path=tmp_path / "tiny")
    code = (
        "from transformers import AutoModelForCausalLM\n"
        "print(AutoModelForCausalLM.from_pretrained('me/tiny').model.norm.weight.numel())"
    )
    done = run_python(code, hub, tmp_path / "home")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "16"


def test_a_data_set_loads_by_name_in_a_fresh_process(hub, api, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    api.create_repo("me/rows", repo_type="dataset")
    api.upload_file(
        path_or_fileobj=tmp_path / "train.jsonl", path_in_repo="train.jsonl", repo_id="me/rows", repo_type="dataset"
    )
    code = "from datasets import load_dataset\nprint(load_dataset('me/rows', split='train')['text'][:])"
    done = run_python(code, hub, tmp_path / "home")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['one', 'two']"


def test_older_revisions_stay_readable_and_deletions_count(api, folder, tmp_path):
    api.create_repo("me/model")
    first = api.upload_folder(repo_id="me/model", folder_path=folder).oid
    api.delete_file("config.json", "me/model")
    assert "config.json" not in api.list_repo_files("me/model")
    assert api.file_exists("me/model", "config.json", revision=first)
    path = api.hf_hub_download("me/model", "config.json", revision=first, cache_dir=tmp_path / "cache")
    assert first in path


def test_what_is_missing_is_told_apart(api, folder, tmp_path):
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("me/nothing")
    api.create_repo("me/model")
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download("me/model", "absent.txt", cache_dir=tmp_path / "cache")
    with pytest.raises(RevisionNotFoundError):
        api.model_info("me/model", revision="v2")


def test_a_repository_is_made_only_once(api):
    api.create_repo("me/model")
    api.create_repo("me/model", exist_ok=True)
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("me/model")


def test_writing_and_private_reading_need_a_token(hub, api):
    stranger = HfApi(endpoint=hub.endpoint, token=False)
    with pytest.raises(HfHubHTTPError, match="401"):
        stranger.create_repo("me/model")
    api.create_repo("me/model", private=True)
    assert api.model_info("me/model").private
    with pytest.raises(RepositoryNotFoundError):
        stranger.model_info("me/model")


def test_a_bad_card_is_refused_before_anything_is_committed(api, folder):
    api.create_repo("me/model")
    (folder / "README.md").write_text("---\n- not\n- a mapping\n---\n")
    with pytest.raises(ValueError, match="YAML mapping"):
        api.upload_file(path_or_fileobj=folder / "README.md", path_in_repo="README.md", repo_id="me/model")
    assert api.list_repo_files("me/model") == []


@pytest.mark.parametrize(
    "request_line",
    [
        "/me/model/resolve/main/..%2F..%2Fsecret",
        "/me/model/resolve/..%2F..%2Fmain/secret",
        "/..%2F../a/resolve/main/b",
    ],
    ids=["in the file", "in the revision", "in the repository"],
)
def test_no_address_leads_out_of_the_folder(hub, api, tmp_path, request_line):
    (tmp_path / "secret").write_text("outside")
    api.create_repo("me/model")
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(hub.endpoint + request_line)
    assert caught.value.code in (400, 404)
    assert "outside" not in caught.value.read().decode()


def test_a_commit_cannot_write_out_of_the_folder(hub, api, tmp_path):
    api.create_repo("me/model")
    body = b'{"key": "file", "value": {"path": "../../escaped", "content": "eA=="}}'
    request = urllib.request.Request(
        f"{hub.endpoint}/api/models/me/model/commit/main", body, {"Authorization": f"Bearer {HUB_TOKEN}"}
    )
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request)
    assert not list(tmp_path.rglob("escaped"))


def upload_address(hub, digest, size):
    """Where the server wants a large file to be sent."""
    body = json.dumps({"objects": [{"oid": digest, "size": size}]}).encode()
    headers = {"Authorization": f"Bearer {HUB_TOKEN}"}
    request = urllib.request.Request(f"{hub.endpoint}/me/model.git/info/lfs/objects/batch", body, headers)
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["objects"][0]["actions"]["upload"]["href"]


@pytest.mark.parametrize(
    "digest, size, other, status",
    [("0" * 64, 9, "", 400), (DIGEST, 3, "", 413), (DIGEST, 9, "1" * 64, 401)],
    ids=["another digest", "more than was said", "for another file"],
)
def test_a_large_file_that_is_not_the_one_that_was_asked_for_is_refused(
    hub, api, tmp_path, digest, size, other, status
):
    api.create_repo("me/model")
    address = upload_address(hub, digest, size).replace(digest, other or digest)
    with pytest.raises(urllib.error.HTTPError, match=str(status)):
        urllib.request.urlopen(urllib.request.Request(address, b"something", method="PUT"))
    assert not list((tmp_path / "hub" / "blobs").iterdir())


def test_a_large_file_goes_only_to_the_address_that_was_handed_out(hub, api, tmp_path):
    api.create_repo("me/model")
    address = upload_address(hub, DIGEST, 9)
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(urllib.request.Request(address.partition("?")[0], b"something", method="PUT"))
    urllib.request.urlopen(urllib.request.Request(address, b"something", method="PUT"))
    assert [path.name for path in (tmp_path / "hub" / "blobs").iterdir()] == [DIGEST]


def test_a_download_resumes_where_it_stopped(hub, api, folder):
    api.create_repo("me/model")
    api.upload_folder(repo_id="me/model", folder_path=folder)
    request = urllib.request.Request(
        f"{hub.endpoint}/me/model/resolve/main/sub/notes.txt", headers={"Range": "bytes=3-"}
    )
    with urllib.request.urlopen(request) as answer:
        assert (answer.status, answer.headers["Content-Range"], answer.read()) == (206, "bytes 3-5/6", b"ted")


def test_the_token_is_neither_printed_nor_kept(api, folder, tmp_path, capfd):
    api.create_repo("me/model", private=True)
    api.upload_folder(repo_id="me/model", folder_path=folder)
    out, err = capfd.readouterr()
    assert HUB_TOKEN not in out + err
    assert not any(HUB_TOKEN.encode() in data for data in contents(tmp_path / "hub").values())
