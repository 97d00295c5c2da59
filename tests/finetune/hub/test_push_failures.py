"""A Hub that fails, a folder that is broken, a command that is wrong: what is tried again, what never uploaded."""

import os
import traceback
from http import HTTPStatus

import pytest
from safetensors.torch import load_file, save_file
from tiny_run import HUB_TOKEN
from typer.testing import CliRunner

from modeling_deepseek_moe import CheckpointError
from modeling_deepseek_moe.cli.main import app
from modeling_deepseek_moe.finetune.demo.hub_store import Blobs, HubError
from modeling_deepseek_moe.finetune.errors import UserError
from modeling_deepseek_moe.finetune.hub.push import push_run
from modeling_deepseek_moe.finetune.hub.upload import RECORD, without_secrets


class Uploads:
    """Counts the blobs that reach the Hub, and lets those after the first `allowed` fail."""

    def __init__(self, monkeypatch, allowed=10**6):
        self.allowed, self.kept, self.refused = allowed, [], 0
        real = Blobs.add_stream

        def add_stream(blobs, sha256, pieces):
            if len(self.kept) >= self.allowed:
                self.refused += 1
                raise HubError(HTTPStatus.INSUFFICIENT_STORAGE, "OutOfOrder", "no room at the moment")
            self.kept.append(sha256)
            real(blobs, sha256, pieces)

        monkeypatch.setattr(Blobs, "add_stream", add_stream)


def test_a_hub_that_is_out_of_order_is_asked_again_and_gets_nothing_twice(sharded, push, api, monkeypatch):
    uploads, waits = Uploads(monkeypatch, allowed=1), []

    def sleep(seconds):
        waits.append(seconds)
        uploads.allowed += 1

    push(sharded, "me/model", sleep=sleep)
    assert waits == [2, 8]
    assert len(uploads.kept) == len(set(uploads.kept)) == 3
    assert "model.safetensors.index.json" in api.list_repo_files("me/model")


def test_a_push_that_failed_is_finished_by_the_same_call(sharded, push, api, tmp_path, monkeypatch):
    uploads, waits = Uploads(monkeypatch, allowed=2), []
    with pytest.raises(UserError, match=r"507.*is complete, and the same command goes on with the upload"):
        push(sharded, "me/model", sleep=waits.append)
    assert waits == [2, 8, 30, 120]
    assert api.list_repo_files("me/model") == [RECORD]
    uploads.allowed = 3
    push(sharded, "me/model")
    assert len(uploads.kept) == len(set(uploads.kept)) == 3
    api.snapshot_download("me/model", local_dir=tmp_path / "back")
    for path in sharded.glob("*.safetensors"):
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()


def test_what_the_hub_refuses_is_not_tried_again(sharded, push, monkeypatch):
    def add_stream(blobs, sha256, pieces):
        raise HubError(HTTPStatus.FORBIDDEN, "Forbidden", "your plan has no room for this")

    monkeypatch.setattr(Blobs, "add_stream", add_stream)
    with pytest.raises(UserError, match="403"):
        push(sharded, "me/model", sleep=lambda seconds: pytest.fail("waited"))


def test_no_token_is_printed_when_the_hub_repeats_it(sharded, hub, monkeypatch):
    def add_stream(blobs, sha256, pieces):
        raise HubError(HTTPStatus.FORBIDDEN, "Forbidden", f"{HUB_TOKEN} may not write, nor may hf_anotheronehere42")

    monkeypatch.setattr(Blobs, "add_stream", add_stream)
    with pytest.raises(UserError) as caught:
        push_run(sharded, "me/model", endpoint=hub.endpoint, token=HUB_TOKEN)
    shown = "".join(traceback.format_exception(caught.value))
    assert "may not write" in shown
    assert HUB_TOKEN not in shown and "anotherone" not in shown


@pytest.mark.parametrize(
    "text",
    ["Bearer abcdef/ghi==", "https://me:sesame@huggingface.co/me", "given-by-hand", "hf_AbCdEfGh123"],
    ids=["in a header", "in an address", "the one given", "by its look"],
)
def test_secrets_are_taken_out_of_a_message(text):
    cleaned = without_secrets(f"no: {text}!", "given-by-hand")
    assert "***" in cleaned
    assert not any(secret in cleaned for secret in ("abcdef", "sesame", "given", "AbCd"))


def spoiled(folder, name):
    weights = load_file(folder / name)
    next(iter(weights.values())).view(-1)[0] = float("nan")
    save_file(weights, folder / name, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda model: os.remove(model / "model-00002-of-00003.safetensors"), "missing shard model-00002-of-00003"),
        (lambda model: spoiled(model, "model-00002-of-00003.safetensors"), "not finite numbers; nothing is pushed"),
        (lambda model: os.truncate(model / "model-00001-of-00003.safetensors", 50_000), "truncated"),
    ],
    ids=["a missing file", "NaN", "a file cut off"],
)
def test_nothing_of_a_broken_folder_is_uploaded(sharded, push, api, spoil, message):
    spoil(sharded)
    with pytest.raises((UserError, CheckpointError), match=message):
        push(sharded, "me/model")
    assert not api.repo_exists("me/model")
    assert not list(sharded.parent.glob("*.aside"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["{empty}", "--to", "me/model"], "has no results to push"),
        (["{unfinished}", "--to", "me/model"], "has no results yet: its run has not come to its end"),
        (["{sharded}/absent", "--to", "me/model"], "does not exist: give the folder of a run"),
        (["{sharded}", "--to", "me/model"], "no token to write to 'me/model': run `hf auth login`"),
        (["{sharded}", "--to", "model"], "'model' is not the name of a repository: give USER/NAME"),
        (
            ["{sharded}", "--to", "me/model", "--merged", "--adapter-only"],
            "--adapter-only and --merged ask for different",
        ),
        (["{sharded}", "--to", "me/model", "--native", "llama"], "--native 'llama' is none of deepseek, deepseek_v2"),
        (["{sharded}", "--to", "me/model", "--adapter-only"], "has no adapter, which --adapter-only asks for"),
    ],
    ids=["no results", "unfinished", "no folder", "no token", "no user", "two kinds", "unknown type", "no adapter"],
)
def test_wrong_use_ends_in_one_line_before_the_hub_is_asked(sharded, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr("modeling_deepseek_moe.finetune.hub.upload.get_token", lambda: None)
    monkeypatch.setattr("httpx2.Client.send", lambda *_, **__: pytest.fail("the Hub was asked"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "unfinished" / "adapter").mkdir(parents=True)
    (tmp_path / "unfinished" / "recipe.yaml").write_text("model: base\n", encoding="utf-8")
    folders = {"sharded": sharded, "empty": tmp_path / "empty", "unfinished": tmp_path / "unfinished"}
    result = CliRunner().invoke(app, ["push", *(argument.format(**folders) for argument in arguments)])
    assert result.exit_code == 1
    assert message in result.stderr and len(result.stderr.strip().splitlines()) == 1
