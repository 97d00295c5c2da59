"""Adapters that are broken, do not fit, or want to do harm: one line that names file and tensor, and no target."""

import json
from pathlib import Path

import pytest
import torch
from adapter_folders import ATTENTION, STACK, edit_json, edit_tensors, native_base, save_adapter
from convert_folders import contents
from hypothesis import given, settings
from json_edits import EDITS, FUZZ, edited

from modeling_deepseek_moe import CheckpointError
from modeling_deepseek_moe.conversion import convert
from modeling_deepseek_moe.conversion.adapters.files import open_adapter
from modeling_deepseek_moe.conversion.adapters.merging import apply_adapter
from modeling_deepseek_moe.conversion.adapters.names import plan_per_expert, plan_stacked
from modeling_deepseek_moe.conversion.engine.source import open_source

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return native_base(tmp_path_factory.mktemp("base"))


def _rename(old: str, new: str):
    return lambda tensors: tensors.update({new: tensors.pop(old)})


A, B = f"{STACK}.lora_A.weight", f"{STACK}.lora_B.weight"
O_PROJ = "base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight"
BROKEN_TENSORS = {
    "a pair without B": (lambda tensors: tensors.pop(B), rf"tensor {A} has no B"),
    "an unknown key": (_rename(O_PROJ, "o_proj.lora_A.weight"), "o_proj.lora_A.weight is neither a LoRA factor"),
    "DoRA": (_rename(O_PROJ, O_PROJ.replace("A.", "magnitude_vector.")), "magnitude_vector.weight is neither"),
    "a vector": (lambda tensors: tensors.update({O_PROJ: torch.ones(4)}), r"\[4\], not a matrix"),
    "another rank": (
        lambda tensors: tensors.update({O_PROJ: torch.ones(3, 64)}),
        "contradict rank 4 of adapter_config",
    ),
    "integers": (lambda tensors: tensors.update({O_PROJ: torch.ones(4, 64, dtype=torch.int64)}), "is I64, not one of"),
    "stacks of two sizes": (
        lambda tensors: tensors.update({A: torch.ones(16, 16), B: torch.ones(32, 16)}),
        "experts, but .* has",
    ),
    "stacked and single experts": (
        lambda tensors: tensors.update({f"{STACK}.0.up_proj.lora_{f}.weight": torch.ones(4, 4) for f in "AB"}),
        r"experts.0.up_proj.lora_A.weight is one expert's, others of .* are stacked",
    ),
    "factors that do not fit": (
        lambda tensors: tensors.update({A: torch.ones(32, 8)}),
        "do not fit the other factors",
    ),
    "nothing": (lambda tensors: tensors.clear(), "holds no LoRA factors"),
}
BROKEN_FIELDS = {
    "DoRA": ({"use_dora": True}, "use_dora=True is not read: only plain LoRA"),
    "bias": ({"bias": "all"}, "bias='all' is not read"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "changes the base weights"),
    "another method": ({"peft_type": "IA3"}, "peft_type='IA3'"),
    "rank of zero": ({"r": 0}, "r=0 is not read"),
    "rank 3": ({"r": 3}, "contradict rank 3"),
    "alpha is a word": ({"lora_alpha": "8"}, "lora_alpha='8'"),
    "no regular expression": ({"rank_pattern": {"(": 4}}, "rank_pattern"),
    "target_parameters is a word": ({"target_parameters": "experts"}, "target_parameters='experts'"),
    "a field of the future": ({"use_something": 1}, "use_something=1"),
}


def refused(adapter: Path, base: Path, message: str) -> None:
    target = adapter.with_name("target")
    for arguments in ((adapter, target, "peft-per-expert"), (adapter, target, "peft"), (base, target, "bf16")):
        with pytest.raises(CheckpointError, match=message) as caught:
            convert(*arguments, **({"adapter": adapter} if arguments[0] == base else {}))
        assert "\n" not in str(caught.value) and str(adapter) in str(caught.value)
        assert not target.exists()


@pytest.fixture(scope="module")
def sound(base, tmp_path_factory) -> dict[str, bytes]:
    return contents(save_adapter(base, tmp_path_factory.mktemp("sound") / "adapter"))


@pytest.fixture
def adapter(sound, tmp_path) -> Path:
    (tmp_path / "adapter").mkdir()
    for name, content in sound.items():
        (tmp_path / "adapter" / name).write_bytes(content)
    return tmp_path / "adapter"


@pytest.mark.parametrize("case", BROKEN_TENSORS)
def test_an_adapter_whose_tensors_are_wrong_is_refused_by_name(case, adapter, base):
    change, message = BROKEN_TENSORS[case]
    edit_tensors(adapter, change)
    refused(adapter, base, message)


@pytest.mark.parametrize("case", BROKEN_FIELDS)
def test_an_adapter_whose_config_says_something_else_is_refused_by_field(case, adapter, base):
    fields, message = BROKEN_FIELDS[case]
    edit_json(adapter, **fields)
    refused(adapter, base, message)


def test_pickles_links_and_half_files_are_refused(adapter, base, tmp_path):
    weights = adapter / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    refused(adapter, base, "adapter_model.safetensors is truncated")
    weights.write_bytes(content[:3])
    refused(adapter, base, "adapter_model.safetensors is no whole safetensors file")
    (tmp_path / "elsewhere").write_bytes(content)
    weights.unlink()
    weights.symlink_to(tmp_path / "elsewhere")
    refused(adapter, base, "is a link out of its folder")
    weights.unlink()
    (adapter / "adapter_model.bin").write_bytes(b"a pickle")
    refused(adapter, base, "adapter_model.bin is a pickle")
    (adapter / "adapter_config.json").write_text('{"r": 4, "r": 8}')
    refused(adapter, base, "adapter_config.json is not JSON")


def test_an_adapter_of_another_model_is_refused_by_tensor(adapter, base, tmp_path):
    def merged(message, **options):
        with pytest.raises(CheckpointError, match=message):
            convert(base, tmp_path / "target", "bf16", adapter=adapter, **options)
        assert not (tmp_path / "target").exists()

    merged("--only q_proj names nothing of it; it has down_proj, gate_up_proj", only=["q_proj"])
    edit_json(adapter, r=2, rank_pattern=dict.fromkeys(ATTENTION, 4))
    merged(rf"tensor {STACK}.*lora_A.weight is that of 16 experts of rank 2, but .* has n_routed_experts=8")
    edit_json(adapter, r=4, rank_pattern={})
    edit_tensors(adapter, lambda tensors: tensors.update({O_PROJ: torch.ones(4, 63)}))
    merged(r"o_proj.lora_B.weight make \[32, 63\], but model.layers.0.self_attn.o_proj.weight is \[32, 64\]")
    other = O_PROJ.replace("layers.0", "layers.9")
    edit_tensors(
        adapter,
        lambda tensors: [
            _rename(x, x.replace("s.0", "s.9"))(tensors) for x in list(tensors) if "layers.0.self_attn.o_proj" in x
        ],
    )
    merged(f"{other} belongs to model.layers.9.self_attn.o_proj.weight, which .* does not have")


def test_experts_without_lora_cannot_be_stacked(adapter, tmp_path):
    convert(adapter, tmp_path / "experts", "peft-per-expert")
    key = f"{STACK}.3.up_proj.lora_A.weight"
    whole = contents(tmp_path / "experts")["adapter_model.safetensors"]
    edit_tensors(tmp_path / "experts", lambda tensors: [tensors.pop(key.replace("_A", f"_{f}")) for f in "AB"])
    with pytest.raises(CheckpointError, match="layers.1.mlp.experts.3.up_proj has no LoRA, others of its layer have"):
        convert(tmp_path / "experts", tmp_path / "back", "peft")
    (tmp_path / "experts" / "adapter_model.safetensors").write_bytes(whole)
    edit_json(tmp_path / "experts", alpha_pattern={"experts.3.up_proj": 9})
    with pytest.raises(CheckpointError, match="layers.1.mlp.experts.3.up_proj differs in rank, scaling"):
        convert(tmp_path / "experts", tmp_path / "back", "peft")
    assert not (tmp_path / "back").exists()


@settings(max_examples=150, **FUZZ)
@given(edits=EDITS)
def test_any_json_for_a_config_is_read_or_refused(sound, fuzzed, edits):
    text = json.dumps(edited(json.loads(sound["adapter_config.json"]), edits)).encode()
    is_read_or_refused(*fuzzed, "adapter_config.json", text, sound)


@settings(max_examples=150, **FUZZ)
@given(edits=EDITS)
def test_any_json_for_a_header_is_read_or_refused(sound, fuzzed, edits):
    original = sound["adapter_model.safetensors"]
    length = int.from_bytes(original[:8], "little")
    text = json.dumps(edited(json.loads(original[8 : 8 + length]), edits)).encode()
    content = len(text).to_bytes(8, "little") + text + original[8 + length :]
    is_read_or_refused(*fuzzed, "adapter_model.safetensors", content, sound)


@pytest.fixture(scope="module")
def fuzzed(base, sound, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzzed")
    for name, content in sound.items():
        (folder / name).write_bytes(content)
    return open_source(base), folder


def is_read_or_refused(source, folder: Path, name: str, content: bytes, sound: dict[str, bytes]) -> None:
    uses = {
        "stacked": lambda: plan_stacked(open_adapter(folder)).config_json,
        "per expert": lambda: plan_per_expert(open_adapter(folder), "keep").config_json,
        "merged": lambda: sorted(apply_adapter(source, folder).deltas),
    }
    try:
        (folder / name).write_bytes(content)
        for use in uses.values():
            try:
                assert json.dumps(use())
            except CheckpointError as error:
                str(error).encode()  # half a character would be a crash where the message is printed
    finally:
        (folder / name).write_bytes(sound[name])
