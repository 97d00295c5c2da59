"""The readers of a conversion against random damage: they return, or raise the typed error; 2,000 cases in all."""

import json
import shutil
from pathlib import Path

import pytest
from convert_folders import QUANTIZATION, bf16_tensors, ragged_json, random_fp8, sharded
from hypothesis import given, settings
from hypothesis import strategies as st
from json_edits import EDITS, FUZZ, edited

from modeling_deepseek_moe import CheckpointError
from modeling_deepseek_moe.checkpoint_files import INDEX_NAME
from modeling_deepseek_moe.conversion.engine.source import open_source
from modeling_deepseek_moe.conversion.formats.table import plan_conversion


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """As small as a checkpoint in two files can be, so that a case takes milliseconds."""
    root = tmp_path_factory.mktemp("small")
    config_json = ragged_json(hidden_size=32, intermediate_size=32, moe_intermediate_size=16, kv_lora_rank=16)
    tensors = random_fp8(bf16_tensors(config_json, root / "saved"))
    return sharded(root / "small", {**config_json, "quantization_config": QUANTIZATION}, tensors, shards=2)


def is_read_or_refused(folder: Path) -> None:
    try:
        source = open_source(folder)
    except CheckpointError as error:
        str(error).encode()  # half a character would be a crash where the message is printed
        return
    for to in ("fp8", "deepseek_v3"):
        try:
            plan = plan_conversion(source, to)
        except CheckpointError:
            continue
        assert plan.size > 0 and json.dumps(plan.config_json)


@pytest.fixture(scope="module")
def broken(small, tmp_path_factory) -> Path:
    return Path(shutil.copytree(small, tmp_path_factory.mktemp("broken") / "folder"))


@settings(max_examples=500, **FUZZ)
@given(data=st.data())
def test_any_bytes_for_a_header_are_read_or_refused(small, broken, data):
    original = (small / "model-00002-of-00002.safetensors").read_bytes()
    length = 8 + int.from_bytes(original[:8], "little")
    damaged = bytearray(original)
    for position, value in data.draw(st.lists(st.tuples(st.integers(0, length - 1), st.integers(0, 255)), max_size=5)):
        damaged[position] = value
    kept = data.draw(st.just(len(damaged)) | st.integers(0, len(damaged)))
    path = broken / "model-00002-of-00002.safetensors"
    try:
        path.write_bytes(bytes(damaged[:kept]) + data.draw(st.binary(max_size=4)))
        is_read_or_refused(broken)
    finally:
        path.write_bytes(original)


@settings(max_examples=600, **FUZZ)
@given(edits=EDITS)
def test_any_json_for_a_header_is_read_or_refused(small, broken, edits):
    original = (small / "model-00002-of-00002.safetensors").read_bytes()
    length = int.from_bytes(original[:8], "little")
    text = json.dumps(edited(json.loads(original[8 : 8 + length]), edits)).encode()
    path = broken / "model-00002-of-00002.safetensors"
    try:
        path.write_bytes(len(text).to_bytes(8, "little") + text + original[8 + length :])
        is_read_or_refused(broken)
    finally:
        path.write_bytes(original)


@settings(max_examples=400, **FUZZ)
@given(edits=EDITS)
def test_any_index_is_read_or_refused(small, broken, edits):
    is_read_with_edits(small, broken, INDEX_NAME, edits)


@settings(max_examples=500, **FUZZ)
@given(edits=EDITS)
def test_any_config_is_read_or_refused(small, broken, edits):
    is_read_with_edits(small, broken, "config.json", edits)


def is_read_with_edits(small: Path, broken: Path, name: str, edits) -> None:
    original = (small / name).read_text()
    try:
        (broken / name).write_text(json.dumps(edited(json.loads(original), edits)))
        is_read_or_refused(broken)
    finally:
        (broken / name).write_text(original)
