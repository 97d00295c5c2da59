"""The benchmark at tiny size: what it writes, what it keeps, and how it fails. Times at this size mean nothing."""

import gc
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from places import BENCHMARKS
from typer.testing import CliRunner

SECTIONS = ["decode", "prefill", "experts", "lora", "train", "load"]
# (section, how it is meant, value); one more, in bytes, depends on the size.
GOALS = {
    ("decode", "at least", 1.0),
    ("decode", "at least", 3.0),
    ("decode", "at least", 9.0),
    ("decode", "at least", 22.0),
    ("decode", "at least", 40.0),
    ("decode", "at most", 4.5),
    ("decode", "at most", 1 / 0.7),
    ("prefill", "at least", 2.0),
    ("prefill", "at least", 1.3),
    ("experts", "at most", 1.3),
    ("lora", "at least", 5.0),
    ("lora", "at most", 1.3),
    ("lora", "at least", 3.0),
    ("lora", "at least", 30.0),
    ("lora", "at most", 1.1),
    ("train", "at least", 3.0),
}


@pytest.fixture(scope="module")
def benchmark():
    """The script's modules as it imports them; global settings are put back."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        for name in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS"):
            patch.setenv(name, "")
        threads, before = torch.get_num_threads(), set(sys.modules)
        import measure
        import routing
        import run
        import workbench

        yield SimpleNamespace(run=run, measure=measure, routing=routing, workbench=workbench)
        torch.set_num_threads(threads)
        gc.unfreeze()
        for name in set(sys.modules) - before:
            if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(BENCHMARKS)):
                del sys.modules[name]


def call(benchmark, *arguments):
    return CliRunner().invoke(benchmark.run.app, ["--size", "tiny", "--threads", "1", *map(str, arguments)])


def routing_file(folder: Path, *lines: str) -> Path:
    path = folder / "routing.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def routing_line(*tokens: list[int]) -> str:
    ids = [expert for token in tokens for expert in token]
    return "\t".join(map(str, ids)) + "\t\t" + "\t".join(["0.1"] * len(ids))


@pytest.fixture(scope="module")
def folder(benchmark, tmp_path_factory) -> Path:
    """Results of all sections with routing from a file."""
    folder = tmp_path_factory.mktemp("benchmark")
    tokens = [[(first + step * 7) % 64 for step in range(6)] for first in range(9)]
    routing = routing_file(folder, routing_line(*tokens[:4]), routing_line(*tokens[4:]))
    result = call(benchmark, "--repeats", 1, "--routing", routing, "--output", folder)
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(scope="module")
def results(folder) -> dict:
    return json.loads((folder / "benchmark.json").read_text(encoding="utf-8"))


def rows(results):
    return [(section, row) for section in results["sections"] for row in results["sections"][section]["rows"]]


def test_every_section_has_rows_with_both_sides(results):
    assert list(results["sections"]) == SECTIONS
    for section, row in rows(results):
        for side in (row["ours"], row["other"]):
            assert side["label"] and side["n"] >= 1, (section, row)
            median, lower, upper = side["quartiles"]
            assert 0 < lower <= median <= upper, (section, row)
        assert row["ours"]["label"] != row["other"]["label"] or "transformers" in row["other"]["label"]
        assert row["ratio"]["quartiles"][0] > 0


def test_the_goals_are_those_of_the_table_and_each_row_says_whether_it_reached_its_own(results):
    found = {(section, *goal) for section, row in rows(results) for goal in (row["goal"] or {}).items()}
    # bfloat16 gate and up projection of 64 experts, 16 wide, on 64 hidden values.
    assert found == GOALS | {("lora", "below by", 64 * 2 * 16 * 64 * 2)}
    for _, row in rows(results):
        ratio = row["ratio"]["quartiles"][0]
        if row["goal"] is None:
            assert row["reached"] is None
        elif "at least" in row["goal"]:
            assert row["reached"] == (ratio >= row["goal"]["at least"])
        elif "at most" in row["goal"]:
            assert row["reached"] == (ratio <= row["goal"]["at most"])
        else:
            saved = row["other"]["quartiles"][0] - row["ours"]["quartiles"][0]
            assert row["reached"] == (saved >= row["goal"]["below by"])


def test_both_sides_agree_within_a_stated_bound_in_every_section(results):
    stated = [(section, row["agreement"]) for section, row in rows(results) if "agreement" in row]
    assert {section for section, _ in stated} == set(SECTIONS)
    assert all(0 <= agreement["difference"] <= agreement["bound"] < 0.2 for _, agreement in stated)


def test_the_environment_says_where_and_with_what_a_section_ran(results):
    for section in results["sections"].values():
        environment = section["environment"]
        assert environment["torch"] == torch.__version__
        assert environment["routing"] == "routing.txt"
        assert (environment["threads"], environment["layers"], environment["size"]) == (1, 2, "tiny")
        assert environment["OMP_WAIT_POLICY"] == "PASSIVE"
        assert all(value > 0 for value in environment["roofs"].values())
        assert environment["commit"] and environment["date"] and environment["device"]


def test_running_a_section_again_replaces_that_one_only(benchmark, folder, results, tmp_path):
    (tmp_path / "benchmark.json").write_text(json.dumps(results), encoding="utf-8")
    assert call(benchmark, "prefill", "--repeats", 2, "--output", tmp_path).exit_code == 0
    again = json.loads((tmp_path / "benchmark.json").read_text(encoding="utf-8"))
    assert list(again["sections"]) == SECTIONS
    changed = [name for name in SECTIONS if again["sections"][name] != results["sections"][name]]
    assert changed == ["prefill"]
    assert again["sections"]["prefill"]["environment"]["routing"] == "uniform"
    assert [row["ours"]["n"] for row in again["sections"]["prefill"]["rows"]] == [2, 2]


def test_table_and_picture_are_redrawn_from_the_json(benchmark, folder, results):
    written = (folder / "benchmark.md").read_text(encoding="utf-8")
    for name in ("benchmark.md", "decode.png"):
        (folder / name).unlink()
    result = call(benchmark, "--only-table", "--output", folder)
    assert result.exit_code == 0
    assert (folder / "benchmark.md").read_text(encoding="utf-8") == written
    assert (folder / "decode.png").read_bytes().startswith(b"\x89PNG")
    for _, row in rows(results):
        assert row["work"] in written and row["other"]["label"] in written


def test_results_of_another_kind_of_cpu_are_refused_and_stay_as_they_are(benchmark, folder, results, tmp_path):
    assert results["sections"]["load"]["environment"]["instructions"]
    results = json.loads(json.dumps(results))
    results["sections"]["load"]["environment"]["instructions"] = "VSX"
    written, before = tmp_path / "benchmark.json", json.dumps(results)
    written.write_text(before, encoding="utf-8")
    for arguments in (("prefill",), ("--only-table",)):
        refused = call(benchmark, *arguments, "--output", tmp_path)
        assert refused.exit_code == 1 and len(refused.output.splitlines()) == 1
        assert "VSX" in refused.output and "--output" in refused.output
        assert written.read_text(encoding="utf-8") == before


def test_the_bytes_of_a_decode_step_are_those_of_what_serves_a_token(bench):
    import decode

    ours, theirs = bench.pair()
    config = ours.model.config
    of_experts = sum(parameter.nbytes for parameter in ours.moe.experts.parameters())
    of_others = sum(parameter.nbytes for parameter in ours.model.parameters()) - of_experts
    expected = of_others - config.vocab_size * config.hidden_size * 2 + of_experts * 6 // 64
    assert decode.step_bytes(ours, 0) == decode.step_bytes(theirs, 0) == expected
    # Two layers, a latent of 32 and a rotary key of 16 numbers a token.
    assert decode.step_bytes(ours, 100) - expected == 2 * 100 * (32 + 16) * 2


def test_without_results_there_is_nothing_to_redraw(benchmark, tmp_path):
    result = call(benchmark, "--only-table", "--output", tmp_path)
    assert result.exit_code == 1
    assert "run a section first" in result.output and len(result.output.splitlines()) == 1


def stand_in(monkeypatch, benchmark, section: str, run) -> None:
    """Lets `section` consist of one case, whose work is `run`."""
    cases = lambda bench: [benchmark.measure.Case("a case", run)]  # noqa: E731
    monkeypatch.setitem(sys.modules, section, SimpleNamespace(cases=cases))


def test_an_interrupted_run_leaves_the_finished_sections(benchmark, monkeypatch, tmp_path):
    def interrupted():
        raise KeyboardInterrupt

    row = benchmark.measure.compare("work", ("ours", [1.0, 2.0]), ("other", [4.0, 4.0]))
    stand_in(monkeypatch, benchmark, "decode", lambda: [row])
    stand_in(monkeypatch, benchmark, "prefill", interrupted)
    result = call(benchmark, "decode", "prefill", "--output", tmp_path)
    assert result.exit_code == 130
    assert "stopped" in result.output and "decode" in result.output
    kept = json.loads((tmp_path / "benchmark.json").read_text(encoding="utf-8"))["sections"]
    assert list(kept) == ["decode"] and kept["decode"]["rows"] == [row]
    assert not list(tmp_path.glob("*.part"))


def test_sides_that_disagree_end_the_run_in_one_line(benchmark, monkeypatch, tmp_path):
    def disagreeing():
        benchmark.measure.agreement("logits", torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5]), 0.1)

    stand_in(monkeypatch, benchmark, "decode", disagreeing)
    result = call(benchmark, "decode", "--output", tmp_path)
    assert result.exit_code == 1
    # 0.5 of the largest entry, 2.5.
    assert "logits of both sides differ by 0.2" in result.output and len(result.output.splitlines()) == 1


@pytest.fixture
def bench(benchmark):
    settings = benchmark.workbench.Settings("tiny", layers=2, threads=1, repeats=1, contexts=(64,), routing=None)
    return benchmark.workbench.Workbench(settings)


def test_both_sides_hold_the_same_tensors(bench):
    ours, theirs = (dict(side.model.named_parameters()) for side in bench.pair())
    assert ours.keys() == theirs.keys()
    assert all(theirs[name] is parameter for name, parameter in ours.items())


def test_a_side_with_another_weight_is_found(benchmark, bench):
    ours, theirs = bench.pair()
    theirs.model.lm_head.weight = torch.nn.Parameter(1.1 * ours.model.lm_head.weight)
    with pytest.raises(benchmark.measure.DisagreementError, match="logits of both sides differ"):
        bench.check_logits(ours, theirs)


def test_the_experts_of_both_sides_get_the_tokens_that_the_routing_says(bench):
    expected = bench.routing.draw(20, seed=7)
    for side in bench.pair():
        seen = []
        hook = side.moe.experts.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[1:]))
        side.route(20, seed=7)
        with torch.no_grad():
            side.model(bench.ids(20, seed=7))
        hook.remove()
        ((index, weights),) = seen
        assert torch.equal(index, expected)
        # Softmax scores of 6 of 64 experts, whichever they are.
        assert (weights > 0).all() and (weights.sum(-1) < 1).all()


@pytest.mark.parametrize("other", [[float("nan"), 1.0], [0.0, 0.0]], ids=["not a number", "nothing but zeros"])
def test_outputs_that_cannot_be_compared_disagree(benchmark, other):
    with pytest.raises(benchmark.measure.DisagreementError):
        benchmark.measure.agreement("logits", torch.zeros(2), torch.tensor(other), 0.1)


def test_the_ratio_is_that_of_neighbouring_runs(benchmark):
    # A machine that slows down threefold: the ratio of the medians would be 3.
    drifting = {"ours": [1.0, 1.0, 3.0, 3.0, 3.0], "other": [2.0, 2.0, 2.0, 6.0, 6.0]}
    row = benchmark.measure.compare("work", ("ours", drifting["ours"]), ("other", drifting["other"]), at_least=2.0)
    assert row["ratio"]["quartiles"][0] == 2.0 and row["reached"] is True
    ceiling = benchmark.measure.compare("work", ("ours", [3.0]), ("other", [2.0]), at_most=1.3)
    assert ceiling["ratio"]["quartiles"][0] == 1.5 and ceiling["reached"] is False


def test_sides_take_turns_with_seeds_of_their_own(benchmark):
    steps = []

    def side(name):
        return lambda seed: lambda: steps.append((name, seed))

    seconds = benchmark.measure.alternate({"a": side("a"), "b": side("b")}, repeats=4)
    assert [len(values) for values in seconds.values()] == [4, 4]
    timed = steps[-8:]
    assert [name for name, _ in timed] == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert len({seed for _, seed in steps}) == len(steps)


def test_an_unknown_section_is_one_line_that_names_the_nearest(benchmark, tmp_path):
    result = call(benchmark, "decod", "--output", tmp_path)
    assert result.exit_code == 1
    assert "unknown section 'decod'" in result.output and "did you mean 'decode'?" in result.output
    assert len(result.output.splitlines()) == 1


GOOD = routing_line([0, 1, 2, 3, 4, 5])
BROKEN = {
    "a word": (GOOD.replace("3", "three"), "'three'"),
    "no gate values": (GOOD.partition("\t\t")[0], "no double tab"),
    "an id too large": (routing_line([0, 1, 2, 3, 4, 64]), "expert id 64 of token 1 is not one of 0 to 63"),
    "five ids": (routing_line([0, 1, 2, 3, 4]), "not a multiple of 6"),
    "an expert twice": (routing_line([0, 1, 2, 3, 4, 4]), "token 1 chooses an expert twice"),
    "a gate value too few": (GOOD.rpartition("\t")[0], "6 expert ids but 5 gate values"),
}


@pytest.mark.parametrize("line, reason", BROKEN.values(), ids=list(BROKEN))
def test_a_broken_routing_file_is_one_line_that_names_the_line(benchmark, tmp_path, line, reason):
    path = routing_file(tmp_path, GOOD, line)
    result = call(benchmark, "experts", "--routing", path, "--output", tmp_path)
    assert result.exit_code == 1
    assert "line 2: " in result.output and reason in result.output
    assert len(result.output.splitlines()) == 1


def test_a_routing_file_that_is_missing_or_empty_is_one_line(benchmark, tmp_path):
    for path in (tmp_path / "missing.txt", routing_file(tmp_path, "")):
        result = call(benchmark, "experts", "--routing", path, "--output", tmp_path)
        assert result.exit_code == 1
        assert str(path) in result.output and len(result.output.splitlines()) == 1


def test_routing_from_a_file_keeps_its_tokens_in_their_order(benchmark, tmp_path):
    tokens = [[6 * place + offset for offset in range(6)] for place in range(10)]
    path = routing_file(tmp_path, routing_line(*tokens[:7]), "", routing_line(*tokens[7:]))
    routing = benchmark.routing.Routing(64, 6, benchmark.routing.read_routing(path))
    drawn = routing.draw(25, seed=3)
    assert drawn.shape == (25, 6)
    places = [tokens.index(row) for row in drawn.tolist()]
    assert places == [(places[0] + step) % 10 for step in range(25)]
    assert {routing.draw(1, seed)[0, 0].item() // 6 for seed in range(200)} == set(range(10))


def test_uniform_routing_gives_every_token_distinct_experts(benchmark):
    drawn = benchmark.routing.Routing(64, 6).draw(4096, seed=0)
    assert all(len(set(row)) == 6 for row in drawn.tolist())
    counts = drawn.flatten().bincount(minlength=64)
    # 384 tokens an expert, with a deviation of 19: none is five of them away.
    assert counts.min() > 290 and counts.max() < 480


def test_another_models_sizes_are_measured_beside_and_against_its_own_class_without_goals(benchmark, tmp_path):
    result = call(benchmark, "decode", "--size", "tiny-glm", "--repeats", 1, "--contexts", 64, "--output", tmp_path)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "benchmark.json").read_text(encoding="utf-8"))["sections"]["decode"]
    assert found["environment"]["size"] == "tiny-glm"
    stated = [row["agreement"] for row in found["rows"] if "agreement" in row]
    assert stated and all(each["difference"] <= each["bound"] for each in stated)
    assert all(row["goal"] is None and row["reached"] is None for row in found["rows"])


def test_lora_on_another_models_sizes_is_held_to_pefts_on_its_own_class(benchmark):
    import lora

    bench = benchmark.workbench.Workbench(benchmark.workbench.Settings("tiny-glm", 2, 1, 1, (64,), None))
    models = lora.Models(bench)
    assert type(models.theirs.side.model).__name__ == "Glm4MoeLiteForCausalLM"
    agrees = lora.check_step(bench, models)
    assert agrees["difference"] <= agrees["bound"]


def test_routing_of_another_model_is_refused_for_sizes_with_fewer_experts_a_token(benchmark, tmp_path):
    path = routing_file(tmp_path, GOOD)
    result = call(benchmark, "decode", "--size", "tiny-glm", "--routing", path, "--output", tmp_path)
    assert result.exit_code == 1
    assert "--routing is of DeepSeek-V2-Lite" in result.output and len(result.output.splitlines()) == 1
