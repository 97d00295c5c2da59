"""Conversions that are stopped: nothing looks finished before it is, and the same call ends with the same bytes."""

import errno
import json
import os
import random
import shutil
import threading
from pathlib import Path

import pytest
import torch
from checkpoint_folders import tensors_of
from convert_folders import bf16_tensors, contents, fp8_folder, ragged_json, sharded
from convert_kills import KilledConversions, killed_at
from safetensors.torch import save_file
from typer.testing import CliRunner

from modeling_deepseek_moe import CheckpointError
from modeling_deepseek_moe.checkpoint_files import INDEX_NAME
from modeling_deepseek_moe.cli.main import app
from modeling_deepseek_moe.conversion import ConversionError, convert


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    """What is converted to bf16, to fp8 (one file of it stays as it is) and to deepseek_v3 (all files do)."""
    root = tmp_path_factory.mktemp("sources")
    json_ = ragged_json()
    tensors = bf16_tensors(json_, root / "saved")
    order = sorted(tensors, key=lambda name: "proj" in name)
    bf16 = sharded(root / "bf16", json_, {name: tensors[name] for name in order}, shards=1)
    plain = {name: tensors[name] for name in order if "_proj" not in name}
    split = sharded(root / "split", json_, tensors, shards=1)
    (split / INDEX_NAME).unlink()
    (split / "model-00001-of-00001.safetensors").unlink()
    _in_two_files(split, plain, {name: tensors[name] for name in order if name not in plain})
    return {"bf16": fp8_folder(root / "fp8"), "fp8": split, "deepseek_v3": bf16}


def _in_two_files(folder: Path, *parts: dict[str, torch.Tensor]) -> None:
    weight_map = {}
    for i, part in enumerate(parts):
        save_file(part, folder / f"part-{i}.safetensors", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, f"part-{i}.safetensors")
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture(scope="module")
def whole(sources, tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """The uninterrupted results, and how many disk operations each took."""
    results = {}
    for to, source in sources.items():
        target = tmp_path_factory.mktemp("whole") / to
        with killed_at(None) as operations:
            convert(source, target, to)
        results[to] = (contents(target), len(operations))
    return results


def looks_complete(folder: Path) -> bool:
    return (folder / "config.json").exists()


def check_after_kill(source: Path, target: Path, to: str, expected: dict[str, bytes]) -> None:
    found = contents(target) if target.exists() else {}
    if looks_complete(target):
        assert {name: data for name, data in found.items() if not name.endswith(".part")} == expected
    for name, data in found.items():
        if not name.endswith(".part"):
            assert data == expected[name], f"{name} has its name but not its bytes"
    convert(source, target, to)
    assert contents(target) == expected


def kill_everywhere(sources, whole, tmp_path, kills: int, seed: int) -> None:
    chance = random.Random(seed)
    before = {to: contents(source) for to, source in sources.items()}
    with KilledConversions() as conversions:
        for i in range(kills):
            to = list(sources)[i % len(sources)]
            expected, operations = whole[to]
            target = tmp_path / str(i)
            signal = conversions.run(sources[to], target, to, event=chance.randrange(operations))
            assert signal == 9
            for _ in range(chance.randrange(2)):  # some are killed twice
                conversions.run(sources[to], target, to, event=chance.randrange(operations))
            check_after_kill(sources[to], target, to, expected)
            shutil.rmtree(target)
    assert {to: contents(source) for to, source in sources.items()} == before


def test_ten_kills_at_random_disk_operations_leave_no_corrupt_result(sources, whole, tmp_path):
    kill_everywhere(sources, whole, tmp_path, kills=10, seed=0)


@pytest.mark.slow
def test_a_hundred_kills_at_random_disk_operations_leave_no_corrupt_result(sources, whole, tmp_path):
    kill_everywhere(sources, whole, tmp_path, kills=100, seed=1)


@pytest.mark.slow
def test_kills_by_a_timer_leave_no_corrupt_result(sources, whole, tmp_path):
    chance = random.Random(2)
    with KilledConversions() as conversions:
        for i in range(30):
            to = list(sources)[i % len(sources)]
            conversions.run(sources[to], tmp_path / str(i), to, seconds=chance.uniform(0.01, 0.3))
            check_after_kill(sources[to], tmp_path / str(i), to, whole[to][0])


def test_a_second_call_writes_only_what_is_missing(sources, tmp_path):
    convert(sources["bf16"], tmp_path / "target", "bf16")
    before = contents(tmp_path / "target")
    kept = tmp_path / "target" / "model-00001-of-00003.safetensors"
    stamp = kept.stat().st_mtime_ns
    (tmp_path / "target" / "model-00002-of-00003.safetensors").unlink()
    os.truncate(tmp_path / "target" / "model-00003-of-00003.safetensors", 1000)
    report = convert(sources["bf16"], tmp_path / "target", "bf16")
    assert list(report.actions.values()) == ["kept", "converted", "converted"]
    assert contents(tmp_path / "target") == before
    assert kept.stat().st_mtime_ns == stamp
    assert set(convert(sources["bf16"], tmp_path / "target", "bf16").actions.values()) == {"kept"}


def test_config_and_index_go_away_before_a_missing_file_is_written_again(sources, tmp_path, monkeypatch):
    target = tmp_path / "target"
    convert(sources["bf16"], target, "bf16")
    (target / "model-00002-of-00003.safetensors").unlink()
    seen = []
    write = os.pwrite

    def pwrite(*arguments):
        seen.append({path.name for path in target.iterdir()})
        return write(*arguments)

    monkeypatch.setattr(os, "pwrite", pwrite)
    convert(sources["bf16"], target, "bf16")
    assert seen and not any({"config.json", INDEX_NAME} & names for names in seen)


def test_a_folder_of_another_source_or_other_options_is_refused(sources, tmp_path):
    source = Path(shutil.copytree(sources["bf16"], tmp_path / "source"))
    convert(source, tmp_path / "target", "bf16")
    before = contents(tmp_path / "target")
    for other, to, dtype in [(sources["deepseek_v3"], "bf16", None), (source, "deepseek_v3", "bfloat16")]:
        with pytest.raises(ConversionError, match="target belongs to another conversion"):
            convert(other, tmp_path / "target", to, dtype=dtype)
    file = source / "model-00001-of-00003.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)  # same names, shapes and sizes, one other value
    with pytest.raises(ConversionError, match="a source that has changed since"):
        convert(source, tmp_path / "target", "bf16")
    assert contents(tmp_path / "target") == before


def test_a_folder_with_other_files_or_in_the_source_is_refused(sources, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("")
    source = Path(shutil.copytree(sources["bf16"], tmp_path / "source"))
    before = contents(tmp_path)
    for target, message in [
        ("mine", r"mine is not empty \(thesis\.txt\)"),
        ("file", "file is a file; give a folder"),
        ("source", "lies in the source"),
        ("source/inside", "lies in the source"),
        ("mine/../source/inside", "lies in the source"),
    ]:
        with pytest.raises(ConversionError, match=message):
            convert(source, tmp_path / target, "bf16")
    assert contents(tmp_path) == before and not (source / "inside").exists()


def test_two_conversions_into_one_folder_do_not_mix(sources, tmp_path):
    """The second comes while the first is at its first file."""
    caught = []

    def second(file: str, count: int, total: int) -> None:
        if not caught:
            with pytest.raises(ConversionError, match="is being written by another conversion"):
                convert(sources["bf16"], tmp_path / "target", "bf16")
            caught.append(file)

    convert(sources["bf16"], tmp_path / "target", "bf16", on_progress=second, verify=True)
    assert caught


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO], ids=["disk", "quota", "hardware"])
def test_a_full_disk_is_one_clear_error_and_the_same_call_goes_on(number, sources, whole, tmp_path, monkeypatch):
    """A real full disk cannot be had in a test; the write fails as it would there."""
    write, calls = os.pwrite, []

    def pwrite(*arguments):
        calls.append(1)
        if len(calls) == 30:  # in the second file
            raise OSError(number, os.strerror(number))
        return write(*arguments)

    monkeypatch.setattr(os, "pwrite", pwrite)
    message = "input/output" if number == errno.EIO else "not enough space"
    with pytest.raises(ConversionError, match=f"(?i){message}.*finished files stay, and the same call goes on"):
        convert(sources["bf16"], tmp_path / "target", "bf16")
    left = contents(tmp_path / "target")
    assert left and not looks_complete(tmp_path / "target") and not any(name.endswith(".part") for name in left)
    convert(sources["bf16"], tmp_path / "target", "bf16")
    assert contents(tmp_path / "target") == whole["bf16"][0]


def test_too_little_space_is_said_before_anything_is_written(sources, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ConversionError, match=r"not enough space in .*: \d+ bytes are needed, 1000 are free"):
        convert(sources["bf16"], tmp_path / "target", "bf16")
    assert not list((tmp_path / "target").glob("*.safetensors"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    convert(sources["bf16"], tmp_path / "target", "bf16")
    (tmp_path / "target" / "model-00002-of-00003.safetensors").unlink()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ConversionError, match="finished files stay"):
        convert(sources["bf16"], tmp_path / "target", "bf16")
    assert len(list((tmp_path / "target").glob("*.safetensors"))) == 2
    convert(sources["deepseek_v3"], tmp_path / "linked", "deepseek_v3")  # links need none


@pytest.mark.parametrize("lost", [1, 100_000], ids=["in an FP8 tensor", "in a tensor that is copied"])
def test_a_source_that_shrinks_meanwhile_is_an_error_and_leaves_nothing(lost, sources, tmp_path):
    source = Path(shutil.copytree(sources["bf16"], tmp_path / "source"))
    size = (source / "model-00003-of-00003.safetensors").stat().st_size

    def shrink(file: str, count: int, total: int) -> None:
        os.truncate(source / "model-00003-of-00003.safetensors", max(size - lost, 2000))

    with pytest.raises(CheckpointError, match=r"model-00003-of-00003\.safetensors ends within tensor"):
        convert(source, tmp_path / "target", "bf16", on_progress=shrink)
    assert not (tmp_path / "target").exists()


def test_ctrl_c_says_that_the_same_call_goes_on(sources, whole, tmp_path, monkeypatch):
    fsync, calls = os.fsync, []

    def stopped(descriptor):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", stopped)
    result = CliRunner().invoke(app, ["convert", str(sources["bf16"]), str(tmp_path / "target"), "--to", "bf16"])
    assert result.exit_code == 130
    assert "the same call goes on" in result.stderr
    monkeypatch.undo()
    convert(sources["bf16"], tmp_path / "target", "bf16")
    assert contents(tmp_path / "target") == whole["bf16"][0]


def test_progress_counts_every_byte_once_in_a_first_and_in_a_second_call(sources, tmp_path):
    for _ in range(2):
        seen: dict[str, int] = {}
        totals = set()

        def count(file: str, bytes_: int, total: int, seen=seen, totals=totals) -> None:
            seen[file] = seen.get(file, 0) + bytes_
            totals.add(total)

        convert(sources["bf16"], tmp_path / "target", "bf16", on_progress=count)
        assert seen == {path.name: path.stat().st_size for path in (tmp_path / "target").glob("*.safetensors")}
        assert totals == {sum(seen.values())}


def test_no_thread_is_left_behind(sources, tmp_path):
    before = threading.active_count()
    convert(sources["bf16"], tmp_path / "target", "bf16")
    assert threading.active_count() == before
    assert tensors_of(tmp_path / "target")
