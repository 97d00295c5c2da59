"""ESFT scores and selection: as DeepSeek published them, for any router; one line for what cannot be used."""

import json

import datasets
import pytest
import torch
from places import ROOT
from tiny import tiny_config, tiny_model, v3_config
from tiny_run import counting_rows, tiny_base, write_jsonl
from typer.testing import CliRunner

from modeling_deepseek_moe.cli.main import app
from modeling_deepseek_moe.finetune.errors import UserError
from modeling_deepseek_moe.finetune.experts.routing import RoutingTotals
from modeling_deepseek_moe.finetune.experts.score_data import sample_of, score_rows
from modeling_deepseek_moe.finetune.experts.scores import (
    esft_scores,
    expert_cfg,
    read_choice,
    read_scores,
    select_experts,
)
from modeling_deepseek_moe.finetune.model.counting import blocks_of

PUBLISHED = ROOT.parent / "shared" / "esft"
needs_published = pytest.mark.skipif(not PUBLISHED.is_dir(), reason="DeepSeek's ESFT data is not in ../shared/esft")


def published(kind: str, task: str) -> dict:
    return json.loads((PUBLISHED / kind / f"{task}.json").read_text())


def scores_of(*layers: list[float], kind: str = "token") -> dict:
    return {f"{kind}_scores": {str(i): {str(e): s for e, s in enumerate(row)} for i, row in enumerate(layers)}}


@needs_published
@pytest.mark.parametrize("task", ["intent", "summary"])
def test_the_published_selection_is_made_of_the_published_scores(task):
    """In all 26 layers, the order of the experts included."""
    scores = read_scores(PUBLISHED / "expert_scores" / f"{task}.json")
    expected = published("expert_configs", task)
    assert len(expected["experts"]) == 26
    assert expert_cfg(scores, "token", 0.2) == expected


@needs_published
@pytest.mark.parametrize("layer", [1, 13, 26])
def test_the_published_scores_are_made_of_the_published_routing(layer):
    """All 128 figures of a layer to the last of their four decimals; a mean over sequences would miss 68 and more."""
    counts, weights, tokens = torch.zeros(64, dtype=torch.int64), torch.zeros(64, dtype=torch.float64), 0
    for line in (PUBLISHED / "routing" / f"intent_layer_{layer}.txt").read_text().splitlines():
        ids, gates = (part.split("\t") for part in line.split("\t\t"))
        index = torch.tensor(list(map(int, ids)))
        counts.index_add_(0, index, torch.ones_like(index))
        weights.index_add_(0, index, torch.tensor(list(map(float, gates)), dtype=torch.float64))
        tokens += len(ids) // 6
    scores = esft_scores(RoutingTotals(tokens, [layer], counts[None], weights[None]))
    assert scores == {
        kind: {str(layer): of_layers[str(layer)]} for kind, of_layers in published("expert_scores", "intent").items()
    }


@pytest.mark.parametrize(
    "lineage, options",
    [
        ("v1", {"num_experts_per_tok": 2}),
        ("v2", {}),
        ("v2", {"norm_topk_prob": True}),
        ("v3", {}),
        ("moonlight", {"norm_topk_prob": False}),
    ],
    ids=["softmax", "softmax, scaled", "softmax, normalised", "sigmoid, normalised, scaled", "sigmoid, scaled"],
)
def test_scores_are_shares_of_the_tokens_and_mean_gate_values_of_any_router(lineage, options):
    """The gate value is normalised where the router does that, and never scaled."""
    config = tiny_config(lineage, **options)
    model = tiny_model(config)
    rows = [{"input_ids": torch.randint(96, (length,)).tolist()} for length in (5, 9, 9, 2)]
    seen = {layer: [] for layer in blocks_of(model)}
    for layer, block in blocks_of(model).items():
        block.gate.register_forward_hook(lambda gate, args, output, kept=seen[layer]: kept.append(output))
    scores = score_rows(model, datasets.Dataset.from_list(rows), sample_tokens=10**6, batch_size=1)
    for layer, outputs in seen.items():
        if layer >= config.num_hidden_layers:
            assert str(layer) not in scores["token_scores"]
            continue
        logits, _, index = (torch.cat(parts) for parts in zip(*outputs, strict=True))
        gates = (logits.sigmoid() if config.scoring_func == "sigmoid" else logits.softmax(-1)).gather(1, index)
        if config.norm_topk_prob:
            gates = gates / gates.sum(-1, keepdim=True)
        assert len(index) == 25 and index.shape[1] == config.num_experts_per_tok
        token = index.flatten().bincount(minlength=8) / index.numel()
        gate = torch.zeros(8).index_add_(0, index.flatten(), gates.flatten()) / len(index)
        for name, expected in (("token_scores", token), ("gate_scores", gate)):
            found = torch.tensor([scores[name][str(layer)][str(expert)] for expert in range(8)])
            # Half of the fourth decimal, and float32 rounding.
            torch.testing.assert_close(found, expected, atol=5.1e-5, rtol=0)


def test_a_sum_of_rounded_scores_reaches_what_it_reaches_on_paper():
    """0.1 + 0.2 is more than 0.3 in binary, and 0.7 + 0.1 + 0.1 less than 0.9; of equals the first listed is taken."""
    assert select_experts(scores_of([0.2, 0.1, 0.7]), "token", 0.9) == {"0": [2, 0]}
    assert select_experts(scores_of([0.1, 0.7, 0.1, 0.1]), "token", 0.9) == {"0": [1, 0, 2]}
    assert select_experts(scores_of([0.1, 0.2, 0.3, 0.4]), "token", 0.3) == {"0": [3]}


def test_a_share_of_one_takes_all_experts_though_rounded_scores_sum_up_to_less():
    assert select_experts(scores_of([0.3333, 0.3333, 0.3333]), "token", 1.0) == {"0": [0, 1, 2]}


def test_a_sample_is_random_rows_of_enough_tokens_and_packed_ones_are_taken_apart():
    rows = datasets.Dataset.from_list([{"input_ids": [i] * 10} for i in range(50)])
    taken = sample_of(rows, 95)["input_ids"]
    assert len(taken) == 10 and taken == sample_of(rows, 95)["input_ids"]
    assert sorted(taken) != taken and len({ids[0] for ids in taken}) == 10
    assert len(sample_of(rows, 10**6)) == 50
    packed = [{"input_ids": [5, 6, 7, 8, 9], "position_ids": [0, 1, 0, 1, 2]}]
    assert sample_of(packed, 5)["input_ids"] == [[5, 6], [7, 8, 9]]


def run(*arguments: object):
    return CliRunner().invoke(app, ["esft", *map(str, arguments)])


def test_the_verbs_write_scores_and_a_choice_in_the_published_formats(tmp_path):
    base, scores, choice = tiny_base(tmp_path / "base"), tmp_path / "scores.json", tmp_path / "expert_cfg.json"
    rows = write_jsonl(tmp_path / "rows.jsonl", counting_rows("messages"))
    done = run("score", base, rows, "--output", scores, "--sample-tokens", 60, "--batch-size", 3)
    assert done.exit_code == 0, done.output
    found = json.loads(scores.read_text())
    assert list(found) == ["token_scores", "gate_scores"]
    for layers in found.values():
        assert list(layers) == ["1", "2"]
        assert all(list(row) == [str(expert) for expert in range(8)] for row in layers.values())
    done = run("select", scores, "--score", "gate", "--output", choice, "--shared-experts")
    assert done.exit_code == 0, done.output
    assert json.loads(choice.read_text()) == expert_cfg(found, "gate", 0.1, shared_experts=True)
    assert "of 8" in done.output
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


GOOD = {"experts": {"1": [3, 0], "2": []}, "shared_experts": False, "non_expert_modules": False}


@pytest.mark.parametrize(
    "text, message",
    [
        (json.dumps({**GOOD, "experts": {"0": [1]}}), "layer 0 of tiny has no routed experts"),
        (json.dumps({**GOOD, "experts": {"7": []}}), "layer 7 of tiny has no routed experts"),
        (json.dumps({**GOOD, "experts": {"1": [8]}}), "layer 1 names expert 8, of 8"),
        (json.dumps({**GOOD, "experts": {"1": [-1]}}), "layer 1 names expert -1, of 8"),
        (json.dumps({**GOOD, "experts": {"1": [2, 2]}}), "not a list of different numbers"),
        (json.dumps({**GOOD, "experts": {"1": [True]}}), "not a list of different numbers"),
        (json.dumps({**GOOD, "experts": {"first": [2]}}), "not a list of different numbers"),
        (json.dumps({**GOOD, "experts": [[3]]}), "is not a JSON object"),
        (json.dumps({**GOOD, "experts": {"1": [], "2": []}}), "names nothing to train"),
        (json.dumps({**GOOD, "experts": {"3": [2]}}), "layer 3 predicts further tokens, and nothing trains it"),
        (json.dumps({**GOOD, "shared": True}), "shared is none of experts, shared_experts, non_expert_modules"),
        ("{", "is not JSON"),
        (None, "is no file: `deepseek-moe esft select` writes one"),
    ],
)
def test_a_choice_that_is_not_of_the_model_ends_in_one_line(tmp_path, text, message):
    path = tmp_path / "expert_cfg.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_choice(path, v3_config(), "tiny")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_choice_may_leave_out_fields_and_name_a_layer_that_a_loss_trains(tmp_path):
    path = tmp_path / "expert_cfg.json"
    path.write_text('{"experts": {"3": [1]}}')
    choice = read_choice(path, v3_config(mtp_loss_weight=0.1), "tiny")
    assert choice == {"experts": {"3": [1]}, "shared_experts": False, "non_expert_modules": False}


SCORES = {"token_scores": {"1": {"0": 0.25, "1": 0.75}}, "gate_scores": {"1": {"0": 0.1, "1": 0.2}}}


@pytest.mark.parametrize(
    "text, options, message",
    [
        (json.dumps(SCORES), ["--top-p", "0"], "`top_p` is 0.0: it is a share"),
        (json.dumps(SCORES), ["--top-p", "1.5"], "`top_p` is 1.5: it is a share"),
        (json.dumps(SCORES), ["--top-p", "nan"], "`top_p` is nan: it is a share"),
        (json.dumps(SCORES), ["--score", "gate", "--top-p", "0.5"], "layer 1 sum up to 0.30, less than top_p=0.5"),
        (json.dumps(SCORES), ["--score", "gates"], "`score` is 'gates': choose one of token, gate"),
        (json.dumps({"token_scores": SCORES["token_scores"]}), [], 'it lacks "gate_scores" by layer'),
        (json.dumps({**SCORES, "token_scores": {"1": {"0": 1, "2": 0}}}), [], "are not those of experts 0, 1, 2"),
        (json.dumps({**SCORES, "token_scores": {"1": {"0": 1.5}}}), [], "expert 0 is 1.5, not a share from 0 to 1"),
        (json.dumps({**SCORES, "token_scores": {"1": {"0": float("nan")}}}), [], "expert 0 is nan, not a share"),
        (json.dumps({**SCORES, "token_scores": {"one": {"0": 1}}}), [], "has a layer 'one', which is no number"),
        ("[]", [], "is no file of ESFT scores"),
        ("nothing", [], "is not JSON"),
    ],
)
def test_scores_that_nothing_can_be_selected_from_end_in_one_line(tmp_path, text, options, message):
    (tmp_path / "scores.json").write_text(text)
    done = run("select", tmp_path / "scores.json", "--output", tmp_path / "expert_cfg.json", *options)
    assert done.exit_code == 1 and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "expert_cfg.json").exists()


def test_what_cannot_be_scored_ends_in_one_line_and_leaves_nothing(tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", counting_rows("text"))
    dense = tiny_base(tmp_path / "dense", "v1", first_k_dense_replace=3)
    out = tmp_path / "out"
    out.mkdir()
    for arguments, message in (
        ((dense, rows, "--output", out / "s.json"), "has no layer with routed experts"),
        ((dense, rows, "--output", out), "is a folder: name a file"),
        ((dense, rows, "--output", out / "none" / "s.json"), "is no folder"),
        ((dense, rows, "--output", out / "s.json", "--sample-tokens", 0), "`sample_tokens` is 0"),
        ((dense, tmp_path / "absent.jsonl", "--output", out / "s.json"), "has no layer with routed experts"),
        ((tmp_path / "absent", rows, "--output", out / "s.json"), "cannot load model"),
    ):
        done = run("score", *arguments)
        assert done.exit_code == 1 and message in done.stderr, done.output
    assert not list(out.iterdir())
