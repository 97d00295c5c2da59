"""Whole models that no process holds: saved by two processes together, read like any other, loaded in parts."""

import json
import sys

import pytest
import torch
from checkpoint_folders import assert_bit_equal, tensors_of
from spread_ranks import run_jobs
from tiny import tiny_config, tiny_model

from modeling_deepseek_moe import DeepseekMoeForCausalLM
from modeling_deepseek_moe.conversion import convert

EP2 = {"fsdp_size": 2, "ep_size": 2}
LARGEST = 40_000
FORMS = {
    "v3": ("v3", {}),
    "v3 tied": ("v3", {"tie_word_embeddings": True}),
    "v2_lite": ("v2_lite", {}),
}
LAYOUTS = {"EP": EP2, "TP": {"tp_size": 2}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder of the bases, folder of the jobs, and what these found."""
    bases, folder = tmp_path_factory.mktemp("bases"), tmp_path_factory.mktemp("jobs")
    jobs = {}
    for form, (lineage, overrides) in FORMS.items():
        tiny_model(tiny_config(lineage, **overrides)).save_pretrained(bases / form)
        for layout, sizes in LAYOUTS.items():
            job = {"do": "shards", "base": str(bases / form), "layout": sizes, "largest": LARGEST}
            jobs[f"{form} {layout}"] = job
    jobs["one file"] = {"do": "shards", "base": str(bases / "v3"), "layout": EP2, "largest": 10**9}
    return bases, folder, run_jobs(folder, 2, jobs)


EVERY = pytest.mark.parametrize("form, layout", [(form, layout) for form in FORMS for layout in LAYOUTS])


@EVERY
def test_the_files_are_those_of_one_process_to_the_bit(saved, form, layout):
    bases, folder, _ = saved
    ours, theirs = folder / f"{form} {layout}" / "model", bases / form
    assert_bit_equal(tensors_of(ours), tensors_of(theirs))
    for name in ("config.json", "generation_config.json"):
        assert json.loads((ours / name).read_text()) == json.loads((theirs / name).read_text())
    index = json.loads((ours / "model.safetensors.index.json").read_text())
    tensors = tensors_of(ours)
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())


@EVERY
def test_processes_write_in_turn_and_hold_one_file_each(saved, form, layout):
    files = saved[2][f"{form} {layout}"]
    assert len(files) > 4
    by_rank = [sum(rank == each for rank, _ in files) for each in (0, 1)]
    assert abs(by_rank[0] - by_rank[1]) <= 1
    largest = max(nbytes for _, nbytes in files)
    whole = sum(nbytes for _, nbytes in files)
    assert largest <= LARGEST < whole / 4


def test_a_small_model_is_one_file(saved):
    model = saved[1] / "one file" / "model"
    assert [path.name for path in model.glob("model*")] == ["model.safetensors"]
    assert_bit_equal(tensors_of(model), tensors_of(saved[0] / "v3"))


@torch.no_grad()
def test_the_folder_is_loaded_and_converted_like_any_other(saved, tmp_path):
    """To DeepSeek's FP8 blocks and back, tensor by tensor, each copy compared with what it was made from."""
    model = saved[1] / "v3 EP" / "model"
    ids = torch.arange(5, 17)[None]
    ours, theirs = (DeepseekMoeForCausalLM.from_pretrained(path).eval() for path in (model, saved[0] / "v3"))
    assert torch.equal(ours(ids).logits, theirs(ids).logits)
    for to in ("bf16", "fp8"):
        report = convert(model, tmp_path / to, to, verify=True)
        assert report.verification.tensors == len(tensors_of(tmp_path / to))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("layout", [EP2, {"fsdp_size": 2}, {"tp_size": 2}], ids=["EP", "FSDP", "TP"])
def test_loading_takes_a_process_its_share_and_one_weight(tmp_path, layout):
    sizes = {"hidden_size": 512, "moe_intermediate_size": 512, "n_routed_experts": 32}
    base = tiny_model(tiny_config("v3", **sizes))
    base.save_pretrained(tmp_path / "base", max_shard_size="80MB")
    nbytes = [p.nbytes for p in base.parameters()]
    (tmp_path / "jobs").mkdir()
    job = {"do": "loading", "base": str(tmp_path / "base"), "layout": layout}
    peaks = run_jobs(tmp_path / "jobs", 2, {"loading": job})["loading"]
    assert len(peaks) == 2
    for peak in peaks:
        assert 0.4 * sum(nbytes) < peak < 0.65 * sum(nbytes) + max(nbytes)
