"""`deepseek-moe experts`: what it counts, compares, draws, writes and refuses."""

import json
import struct

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, PromptTuningConfig, get_peft_model
from peft.tuners import lora
from tiny_run import counting_rows, tiny_base, tiny_tokenizer, write_jsonl
from typer.testing import CliRunner

from modeling_deepseek_moe import DeepseekMoeForCausalLM
from modeling_deepseek_moe.cli.main import app
from modeling_deepseek_moe.finetune.data.rows import encode
from modeling_deepseek_moe.finetune.errors import UserError
from modeling_deepseek_moe.finetune.experts import report as experts_report
from modeling_deepseek_moe.finetune.experts.plots import expert_map
from modeling_deepseek_moe.finetune.experts.report import report_experts
from modeling_deepseek_moe.finetune.experts.routing import padded_batches, routing_totals
from modeling_deepseek_moe.finetune.model.lora import known_warnings, lora_config


def rows_of_many_lengths(first=0):
    """18 rows of 1 to 9 of the words `first` to `first + 5`: batches of them need padding."""
    return [{"text": " ".join(f"w{first + (i + j) % 6}" for j in range(1 + i % 9))} for i in range(18)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("experts")


@pytest.fixture(scope="module")
def base(folder):
    # Weights so large that words differ much in the experts they go to.
    return tiny_base(folder / "base", initializer_range=0.5)


@pytest.fixture(scope="module")
def one(folder):
    return write_jsonl(folder / "one.jsonl", rows_of_many_lengths())


@pytest.fixture(scope="module")
def other(folder):
    return write_jsonl(folder / "other.jsonl", rows_of_many_lengths(first=40))


@pytest.fixture(scope="module")
def compared(folder, base, one, other):
    """A report of two sets; its files are in `compared/`."""
    return report_experts(base, one, other, folder / "compared", batch_size=4)


def call(*arguments):
    return CliRunner().invoke(app, ["experts", *(str(argument) for argument in arguments)])


def loads(report, number=0):
    return [layer["loads"][number] for layer in report["layers"]]


def test_all_tokens_of_all_rows_are_counted(compared, base, one):
    ids = [encode(row, tiny_tokenizer(), 2048)[0] for row in rows_of_many_lengths()]
    model = DeepseekMoeForCausalLM.from_pretrained(base)
    totals = routing_totals(model, padded_batches(Dataset.from_dict({"input_ids": ids}), batch_size=len(ids)))
    assert compared["data"][0] | {"tokens": totals.tokens, "rows": len(ids), "source": str(one)} == compared["data"][0]
    assert [layer["layer"] for layer in compared["layers"]] == totals.layers
    assert [load["counts"] for load in loads(compared)] == totals.counts.tolist()
    means = torch.tensor([load["mean_weight"] for load in loads(compared)], dtype=torch.float64)
    assert torch.allclose(means, totals.weights / totals.tokens, rtol=1e-5), "other batches, other sums in float32"


def test_statistics_follow_from_the_counts(compared):
    for number in (0, 1):
        for load in loads(compared, number):
            counts = torch.tensor(load["counts"], dtype=torch.float64)
            share = counts / counts.sum()
            assert counts.sum() == compared["data"][number]["tokens"] * compared["top_k"]
            assert load["share"] == pytest.approx(share.tolist())
            assert load["max_violation"] == pytest.approx(share.max().item() * 8 - 1, abs=2e-6), "rounded"
            entropy = -sum(x * x.log() for x in share if x) / torch.tensor(8.0).log()
            assert load["load_entropy"] == pytest.approx(entropy.item(), abs=2e-6), "rounded"
            assert load["unused_experts"] == (counts == 0).sum().item() / 8


def test_a_comparison_follows_from_the_counts(compared):
    for layer in compared["layers"]:
        one, other = (load["share"] for load in layer["loads"])
        differences = [abs(a - b) for a, b in zip(one, other, strict=True)]
        assert 0 < layer["distance"] == pytest.approx(sum(differences) / 2, abs=1e-6)
        for claimed, mine, theirs in zip(layer["claimed"], (one, other), (other, one), strict=True):
            # In the halves of both sets it holds, and so in the whole.
            assert all(mine[expert] > 1 / 8 and mine[expert] >= 2 * theirs[expert] for expert in claimed)
    assert all(compared["layers"][1]["claimed"]), "each of these sets claims an expert"


def test_a_set_compared_with_itself_claims_nothing(tmp_path, base, one, monkeypatch):
    drawn = []
    monkeypatch.setattr(experts_report, "expert_map", lambda *args: drawn.append(args) or expert_map(*args))
    report = report_experts(base, one, one, tmp_path)
    assert [data["name"] for data in report["data"]] == ["one.jsonl", "one.jsonl (again)"]
    assert [(layer["distance"], layer["claimed"]) for layer in report["layers"]] == [(0, [[], []])] * 2
    ((shares, layers, _, differences),) = drawn
    assert (len(shares), layers, len(differences)) == (2, [1, 2], 1)
    assert not any(difference.any() for difference in differences.values())


def test_what_half_of_a_set_does_is_no_claim(tmp_path, base):
    """An expert of one row's words only: chance alone could have put that row into the set."""
    rows = [{"text": "w1 w2 w3 w1 w2 w3"}, {"text": "w44 w55 w66 w44 w55 w66"}]
    two = write_jsonl(tmp_path / "two.jsonl", rows)
    report = report_experts(base, two, write_jsonl(tmp_path / "one.jsonl", rows[1:] * 2), tmp_path)
    shares = [torch.tensor([load["share"] for load in loads(report, number)]) for number in (0, 1)]
    assert ((shares[0] > 1 / 8) & (shares[0] >= 2 * shares[1])).any(), "the whole set would claim one"
    assert [layer["claimed"][0] for layer in report["layers"]] == [[], []]


def test_halves_of_a_set_tell_chance_from_difference(tmp_path, base):
    """Rows of two kinds in turns have like halves; rows that are all the same have the same ones."""
    rows = [{"text": "w1 w2 w3"}, {"text": "w44 w55 w66"}] * 40
    mixed = write_jsonl(tmp_path / "mixed.jsonl", rows)
    report = report_experts(base, mixed, write_jsonl(tmp_path / "same.jsonl", rows[:1] * 4), tmp_path)
    of_mixed, of_same = (load["distance_of_halves"] for load in report["layers"][0]["loads"])
    # The two kinds are twice as far from each other as one of them is from all rows.
    assert of_same == 0 < of_mixed < report["layers"][0]["distance"]


def test_json_is_strict_and_holds_what_is_returned(tmp_path, compared, folder):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads((folder / "compared" / "experts.json").read_text(), parse_constant=refuse) == compared


def test_a_single_row_and_a_single_expert_have_no_chance_and_no_entropy(tmp_path):
    base = tiny_base(tmp_path / "base", "moonlight", n_routed_experts=1, num_experts_per_tok=1)
    report_experts(base, write_jsonl(tmp_path / "rows.jsonl", [{"text": "w1 w2"}]), output_dir=tmp_path)
    for load in loads(json.loads((tmp_path / "experts.json").read_text())):
        assert (load["load_entropy"], load["distance_of_halves"], load["counts"]) == (None, None, [4])


def png_size(path):
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", content[16:24])


def test_the_picture_has_a_map_of_each_set_and_of_the_difference(tmp_path, base, one, folder, compared):
    report_experts(base, one, output_dir=tmp_path)
    width, height = png_size(tmp_path / "experts.png")
    assert width > height > 100
    wide, high = png_size(folder / "compared" / "experts.png")
    # A picture is as large as its labels need it, and each has some of its own.
    assert wide == pytest.approx(width, rel=0.05) and high == pytest.approx(3 * height, rel=0.05)


def test_the_command_prints_tables_and_ends_with_the_paths(tmp_path, base, one, other):
    result = call(base, one, "--compare", other, "--output", tmp_path / "out", "--rows", 5)
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.split())
    for word in ("one.jsonl: 5 rows", "other.jsonl: 5 rows", "MaxVio", "unused", "busiest experts", "of halves"):
        assert word in text
    assert "at least 2 times the expert's share of the other set" in text, "the legend says what claimed means"
    *_, picture, table = result.stdout.splitlines()
    assert (picture, table) == (f"picture: {tmp_path}/out/experts.png", f"JSON: {tmp_path}/out/experts.json")
    assert "5/5" in result.stderr and "tokens/s" in result.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["experts.json", "experts.png"]


def test_rows_are_spread_over_the_data_and_cut_to_max_length(tmp_path, base, one):
    report = report_experts(base, one, output_dir=tmp_path, rows=3, max_length=5, dtype="bfloat16")
    # Rows 0, 6 and 12 have 1, 7 and 4 words, BOS in front and EOS behind.
    tokens = 3 + 5 + 5
    assert report["data"] == [{"name": "one.jsonl", "source": str(one), "split": "train", "rows": 3, "tokens": tokens}]
    assert report["dtype"] == "bfloat16"


def test_chats_count_with_all_their_turns(tmp_path, base):
    rows = counting_rows("messages", 4)
    report = report_experts(base, write_jsonl(tmp_path / "rows.jsonl", rows), output_dir=tmp_path)
    assert report["data"][0]["tokens"] == sum(len(encode(row, tiny_tokenizer(), 64)[0]) for row in rows)


def test_rows_with_nothing_to_learn_are_left_out_and_shown(tmp_path, base, capsys):
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "w1 " * 40, "completion": "w2"}, {"text": "w1"}])
    report = report_experts(base, rows, output_dir=tmp_path, max_length=32)
    assert report["data"][0]["rows"] == 1
    shown = capsys.readouterr().out
    assert "1 of 2 used" in " ".join(shown.split()) and "left out" in shown


def with_adapter(base, folder, targets=("all",)):
    torch.manual_seed(0)
    model = DeepseekMoeForCausalLM.from_pretrained(base)
    with known_warnings():
        adapted = get_peft_model(model, lora_config(model, targets, r=4))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(folder)
    return folder


def test_an_adapter_routes_as_the_model_it_is_merged_into(tmp_path, base, one, monkeypatch):
    adapter = with_adapter(base, tmp_path / "adapter")
    # PEFT's own pass, which builds W + B A of all experts, serves the router only.
    peft_pass, served = lora.ParamWrapper.forward, set()
    monkeypatch.setattr(
        lora.ParamWrapper, "forward", lambda self, *args: served.add(self.parameter_name) or peft_pass(self, *args)
    )
    with_it = report_experts(base, one, output_dir=tmp_path, adapter=adapter)
    assert served == {"weight"}
    with known_warnings():
        adapted = PeftModel.from_pretrained(DeepseekMoeForCausalLM.from_pretrained(base), adapter)
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    tiny_tokenizer().save_pretrained(tmp_path / "merged")
    alone = report_experts(tmp_path / "merged", one, output_dir=tmp_path)
    without = report_experts(base, one, output_dir=tmp_path)
    assert with_it["adapter"] == str(adapter)
    counts, of_merged, of_base = ([load["counts"] for load in loads(report)] for report in (with_it, alone, without))
    assert counts == of_merged != of_base


def test_an_adapter_of_the_prompt_is_refused(tmp_path, base, one):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with known_warnings():
        get_peft_model(DeepseekMoeForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "prompt")
    with pytest.raises(UserError, match="adds tokens to the prompt: only adapters of weights"):
        report_experts(base, one, output_dir=tmp_path / "out", adapter=tmp_path / "prompt")


def test_an_adapter_of_a_deeper_model_is_refused(tmp_path, base, one):
    deeper = tiny_base(tmp_path / "deeper", num_hidden_layers=5)
    adapter = with_adapter(deeper, tmp_path / "adapter", ["attention"])
    with pytest.raises(UserError, match=r"does not fit the model, which has no place for .*layers\.4\."):
        report_experts(base, one, output_dir=tmp_path / "out", adapter=adapter)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"first_k_dense_replace": 3}, "base' has no layer with routed experts"),
        ({"vocab_size": 64}, "has vocab_size=64 but its tokenizer knows 86 tokens"),
    ],
    ids=["no experts", "small vocabulary"],
)
def test_a_model_that_cannot_be_used_is_one_line(tmp_path, one, config, message):
    tiny_base(tmp_path / "base", **config)
    result = call(tmp_path / "base", one, "--output", tmp_path / "deep" / "out")
    assert (result.exit_code, result.stdout) == (1, "")
    assert message in result.stderr.splitlines()[-1]
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "has no rows to learn from"),
        ('{"text": "w1"}\nw2 w3\n', "line 2: not JSON"),
        ('{"prompt": "w1"}\n', "line 1: a row has `messages`, `prompt` and `completion`, or `text`"),
    ],
    ids=["empty", "not JSON", "of no kind"],
)
def test_data_that_cannot_be_used_is_one_line(tmp_path, base, one, content, message):
    (tmp_path / "rows.jsonl").write_text(content)
    result = call(base, one, "--compare", tmp_path / "rows.jsonl", "--output", tmp_path / "out")
    assert (result.exit_code, result.stdout) == (1, "")
    assert message in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--rows", 0], "`rows` is 0"),
        (["--batch-size", 0], "`batch_size` is 0"),
        (["--max-length", 1], "`max_length` is 1"),
        (["--dtype", "int8"], "`dtype` is 'int8': choose one of"),
        (["--adapter", "./absent"], "cannot put adapter './absent' on the model"),
        (["--compare", "./absent"], "data './absent' does not exist"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_an_option_that_cannot_be_used_is_one_line(tmp_path, base, one, arguments, message):
    result = call(base, one, "--output", tmp_path / "out", *arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert message in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_an_unknown_option_exits_with_2(base, one):
    assert call(base, one, "--fast").exit_code == 2


def test_an_output_folder_that_is_a_file_is_refused_before_the_model_is_loaded(tmp_path, one):
    (tmp_path / "out").write_text("mine")
    result = call(tmp_path / "absent", one, "--output", tmp_path / "out")
    assert (result.exit_code, result.stderr) == (1, f"output folder {tmp_path / 'out'} is a file: name another\n")
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("at", ["_count", "write_text"], ids=["while counting", "while writing"])
def test_ctrl_c_leaves_the_folder_as_it_was(tmp_path, base, one, monkeypatch, at):
    def stop(*_):
        raise KeyboardInterrupt

    (tmp_path / "old").mkdir()
    earlier = json.dumps({"claim": None, "even_share": 0.25, "layers": []})
    (tmp_path / "old" / "experts.json").write_text(earlier)
    monkeypatch.setattr(experts_report, at, stop)
    for folder in (tmp_path / "old", tmp_path / "new"):
        result = call(base, one, "--output", folder)
        assert result.exit_code == 130
        assert result.stderr.endswith(f"\nstopped: {folder} is as it was before\n")
    assert [(path.name, path.read_text()) for path in (tmp_path / "old").iterdir()] == [("experts.json", earlier)]
    assert not (tmp_path / "new").exists()


def test_a_second_call_replaces_the_files_of_the_first_and_nothing_else(tmp_path, base, one, other):
    (tmp_path / "notes.txt").write_text("mine")
    report_experts(base, one, output_dir=tmp_path)
    picture = (tmp_path / "experts.png").read_bytes()
    report = report_experts(base, other, output_dir=tmp_path)
    assert json.loads((tmp_path / "experts.json").read_text()) == report
    assert (tmp_path / "experts.png").read_bytes() != picture
    assert (tmp_path / "notes.txt").read_text() == "mine"
