"""The GPU benchmark without a GPU: its checks on interpreted kernels, what it counts, what it writes, how it fails."""

import gc
import json
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from places import BENCHMARKS
from tiny import tiny_config
from torch.utils.flop_counter import FlopCounterMode

from modeling_deepseek_moe.experts import DeepseekMoeExperts

pytest.importorskip("triton", reason="Triton is not installed here")

# (section, other side): the goal of the ratio
RATIOS = {
    ("experts", "grouped_mm"): ("at least", 1.15),
    ("lora", "frozen experts without LoRA"): ("at most", 1.2),
    ("lora", "PEFT, grouped_mm"): ("at least", 2.0),
    ("decode", "transformers"): ("at least", 3.0),
    ("step", "transformers + PEFT"): ("at least", 1.8),
}
# (section, size or heads): the goal of a roof
SHARES = {("experts", "V3"): ("product", 0.65), ("latent", 16): ("copy", 0.75), ("latent", 128): ("product", 0.5)}


@pytest.fixture(scope="module")
def gpu():
    """The script's modules as it imports them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        before = set(sys.modules)
        import gpu
        import gpu_checks
        import gpu_counts
        import gpu_rows

        yield SimpleNamespace(gpu=gpu, checks=gpu_checks, counts=gpu_counts, rows=gpu_rows)
        gc.unfreeze()
        for name in set(sys.modules) - before:
            if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(BENCHMARKS)):
                del sys.modules[name]


def run(gpu, *arguments) -> int:
    return gpu.gpu.main(["--device", "cpu", "--repeats", "1", *map(str, arguments)])


@pytest.fixture
def only_latents(gpu, monkeypatch):
    """Leaves one check of all, of bfloat16 latents."""
    latents = partial(gpu.checks._latents, gpu.checks.TINY, torch.bfloat16)
    monkeypatch.setattr(
        gpu.checks, "_checks_of", lambda device: [("latents", torch.bfloat16, partial(latents, device))]
    )


def test_every_launcher_agrees_with_its_reference(gpu, monkeypatch, capsys):
    monkeypatch.delitem(gpu.checks.BOUNDS, torch.float16)  # interpreted like bfloat16
    assert run(gpu) == 0, capsys.readouterr().err
    assert "44 results agree with float64 references" in capsys.readouterr().out


def test_a_wrong_kernel_is_named_and_nothing_is_timed(gpu, only_latents, monkeypatch, capsys, tmp_path):
    right = gpu.checks.latent_attention

    def with_one_wrong_row(queries, *inputs):
        output = right(queries, *inputs)
        output[-1, -1, -1] = 0
        return output

    monkeypatch.setattr(gpu.checks, "latent_attention", with_one_wrong_row)
    assert run(gpu, "--sections", "latent", "--output", tmp_path) == 1
    err = capsys.readouterr().err
    assert "WRONG latents, bfloat16: 3 heads, 1 of 37 tokens, causal: off by" in err
    assert err.endswith("8 of 10 results are wrong: nothing is timed\n")
    results = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert results["sections"] == {} and sum(check["holds"] for check in results["checks"]) == 2


def test_memory_that_no_kernel_writes_is_found(gpu, only_latents, monkeypatch, capsys):
    def unwritten(queries, cached, rank, *_):
        return queries.new_empty(*queries.shape[:-1], rank)

    monkeypatch.setattr(gpu.checks, "latent_attention", unwritten)
    assert run(gpu) == 1
    assert capsys.readouterr().err.count(": off by nan of the norm") == 8


def test_rows_are_measured_and_written_with_goals_and_predictions(gpu, only_latents, capsys, tmp_path):
    assert run(gpu, "--sections", "latent", "--output", tmp_path) == 0, capsys.readouterr().err
    results = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert list(results["sections"]) == ["latent"] and results["left_out"] == []
    assert results["environment"]["torch"] == torch.__version__ and results["environment"]["routing"] == "Zipf"
    for row in results["sections"]["latent"]:
        assert row["share_goal"]["of"] == "copy" and row["agreement"]["difference"] <= row["agreement"]["bound"]
        counted = next(each for each in results["predictions"] if each["work"] == row["work"])
        assert row["bytes_per_second"] == pytest.approx(counted["bytes"] / row["ours"]["quartiles"][0])
    table = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert all(row["work"] in table for row in results["sections"]["latent"])
    assert "10 of 10 results agree" in table and "Measured roofs: " in table


def test_rows_that_no_minutes_are_left_for_are_named(gpu, only_latents, capsys, tmp_path):
    assert run(gpu, "--sections", "latent", "--minutes", 1e-6, "--output", tmp_path) == 0
    works = [row.work for row in gpu.rows.rows_of("latent", gpu.rows.TINY)]
    assert json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["left_out"] == works
    assert all(f"left out: {work}" in capsys.readouterr().out for work in works[:1])


def test_a_row_that_fails_leaves_the_others_their_turn(gpu, only_latents, monkeypatch, capsys, tmp_path):
    import gpu_attention

    measure = gpu_attention.latent_row

    def failing(bench, row):
        if "bf16" in row.work:
            raise RuntimeError("out of luck")
        return measure(bench, row)

    monkeypatch.setattr(gpu_attention, "latent_row", failing)
    assert run(gpu, "--sections", "latent", "--output", tmp_path) == 1
    assert capsys.readouterr().err.endswith("1 rows failed\n")
    failed, measured = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["sections"]["latent"]
    assert failed["error"] == "RuntimeError: out of luck" and measured["ours"]["n"] == 1


@pytest.mark.slow
def test_every_section_runs_on_interpreted_kernels(gpu, only_latents, capsys, tmp_path):
    names = "attention,experts,lora,decode,step"
    assert run(gpu, "--sections", names, "--output", tmp_path) == 0, capsys.readouterr().err
    sections = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["sections"]
    found = {name: sum("ours" in row for row in rows) for name, rows in sections.items()}
    assert found == {"experts": 2, "lora": 3, "decode": 1, "step": 2, "attention": 4}
    assert "flash_attention_2: No module named" in (tmp_path / "gpu.md").read_text(encoding="utf-8")
    agreements = [row["agreement"] for rows in sections.values() for row in rows if "agreement" in row]
    assert len(agreements) == 5 and all(each["difference"] <= each["bound"] for each in agreements)


def test_every_goal_has_its_rows(gpu):
    ratios, shares = {}, {}
    for section in gpu.gpu.SECTIONS:
        for row in gpu.rows.rows_of(section):
            ratios |= {(section, other): goal for other, goal in row.ratios.items()}
            if row.share:
                size = row.facts["size"]
                shares[section, getattr(size, "heads", size[0])] = row.share
    assert ratios == RATIOS and shares == SHARES
    tokens = {(row.facts["size"].name, row.facts["tokens"]) for row in gpu.rows.rows_of("experts")}
    assert tokens == {(size, count) for size in ("V2-Lite", "V3") for count in (4096, 8192, 16384)}
    latents = {row.facts["size"][:2] for row in gpu.rows.rows_of("latent")}
    assert {(1, 2048), (64, 65536)} < latents


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_operations_of_experts_are_those_that_torch_counts(gpu, trained):
    config = tiny_config("v2_lite")
    size = gpu.counts.ExpertSize("tiny", 32, 16, 8, 3)
    experts = DeepseekMoeExperts(config).requires_grad_(trained)
    index = torch.rand(20, size.E).topk(size.K).indices
    with FlopCounterMode(display=False) as counter:
        output = experts(torch.randn(20, size.H, requires_grad=True), index, torch.rand(index.shape))
        output.sum().backward()
    works = gpu.counts.expert_forward(size, 20) + gpu.counts.expert_backward(size, 20, trained=trained)
    products = [launch for launch in works.launches if launch.name != "sum_pairs"]
    assert sum(launch.flops for launch in products) == counter.get_total_flops()


def test_bytes_and_times_of_a_latent_row_are_those_counted_by_hand(gpu):
    size = gpu.counts.LatentSize(batch=64, context=65536, heads=16)
    bf16, fp8 = (gpu.counts.latent_attention(size, is_fp8) for is_fp8 in (False, True))
    # 576 numbers of two bytes; 512 of one, 4 scales of four, 64 numbers of two. Queries and outputs on top.
    ends = 64 * 16 * (576 + 512) * 2
    assert bf16.bytes == 64 * 65536 * 1152 + ends and fp8.bytes == 64 * 65536 * 656 + ends
    assert bf16.seconds(gpu.counts.Roofs(flops=1e30, bytes=1e12)) == pytest.approx(bf16.bytes / 1e12)
    assert bf16.seconds(gpu.counts.Roofs(flops=1e12, bytes=1e30)) == pytest.approx(2 * 64 * 16 * 65536 * 1.088e-9)


def test_rows_that_only_fill_tiles_cost_time(gpu):
    # Of 1, 128 and 129 rows, in tiles of 128: 512 instead of 258.
    padding = gpu.counts.tile_padding([1, 128, 129, 0], 128)
    assert padding == 512 / 258
    launch = gpu.counts.Launch("product", flops=1e12, bytes=1.0, padding=padding)
    assert launch.seconds(gpu.counts.Roofs(1e12, 1e12)) == padding


def test_predictions_are_printed_without_a_gpu_and_called_so(gpu, capsys):
    assert gpu.gpu.main(["--predict"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Predictions, not measurements") and "990 TFLOP/s and 3.35 TB/s" in out
    rows = [row for section in gpu.gpu.SECTIONS for row in gpu.rows.rows_of(section)]
    assert all(f"| {row.work} |" in out for row in rows)


WRONG = {
    "an unknown flag": (["--predikt"], "unrecognized arguments: --predikt"),
    "an unknown section": (["--sections", "latent,foo"], "unknown section 'foo'"),
    "no minutes": (["--minutes", "0"], "must be above zero"),
    "no number": (["--repeats", "many"], "invalid int value: 'many'"),
}


@pytest.mark.parametrize("arguments, words", WRONG.values(), ids=list(WRONG))
def test_wrong_arguments_are_one_line(gpu, capsys, arguments, words):
    with pytest.raises(SystemExit) as stop:
        gpu.gpu.main(arguments)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and words in err and len(err.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_way_out_is_one_line(gpu, capsys):
    assert gpu.gpu.main([]) == 1
    err = capsys.readouterr().err
    assert "torch sees no CUDA device" in err and "--predict" in err and len(err.splitlines()) == 1


def test_a_routing_file_that_is_missing_is_one_line(gpu, only_latents, capsys, tmp_path):
    assert run(gpu, "--sections", "latent", "--routing", tmp_path / "missing.txt") == 1
    err = capsys.readouterr().err
    assert "missing.txt" in err and len(err.splitlines()) == 1
