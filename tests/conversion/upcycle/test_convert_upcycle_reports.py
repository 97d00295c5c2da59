"""What upcycling verifies and reports, and the command."""

import shutil
from pathlib import Path

import pytest
import torch
from dense_folders import upcycled
from safetensors.torch import load_file, save_file
from tiny_run import counting_rows, tiny_tokenizer, write_jsonl
from typer.testing import CliRunner

from modeling_deepseek_moe import CheckpointError, DeepseekMoeForCausalLM
from modeling_deepseek_moe.cli.main import app
from modeling_deepseek_moe.conversion import ConversionError
from modeling_deepseek_moe.errors import UserError


@pytest.mark.parametrize("part", ["experts.3.down_proj", "shared_experts.up_proj", "gate"])
def test_verification_finds_one_wrong_value(part, llama, experts_of_llama, tmp_path):
    target = Path(shutil.copytree(experts_of_llama, tmp_path / "target"))
    name = f"model.layers.1.mlp.{part}.weight"
    file = next(f for f in target.glob("*.safetensors") if name in load_file(f))
    tensors = load_file(file)
    tensors[name][1, 1] += 1e-6 if part == "gate" else 1e-3
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=r"model\.layers\.1\.mlp\.gate\.weight .*remove it, convert again"):
        upcycled(llama, target, verify=True)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_the_report_says_what_training_has_to_win_back(kind, llama, tmp_path):
    source = Path(shutil.copytree(llama, tmp_path / "source"))
    tiny_tokenizer().save_pretrained(source)
    words = " ".join(f"w{(7 * i) % 80}" for i in range(700))
    if kind == "text":
        (tmp_path / "data.txt").write_text(words)
        data = tmp_path / "data.txt"
    else:
        data = write_jsonl(tmp_path / "data.jsonl", counting_rows("prompt"))
    losses = upcycled(source, tmp_path / "target", data=data).losses
    model = DeepseekMoeForCausalLM.from_pretrained(tmp_path / "target")
    if kind == "text":
        tokens = torch.tensor([tiny_tokenizer()(words)["input_ids"]])
        total = sum(model(row, labels=row).loss * (row.shape[1] - 1) for row in tokens.split(512, 1))
        assert losses.tokens == 698
        # Both are float32 sums of the same numbers.
        torch.testing.assert_close(torch.tensor(losses.top_k), total / 698, rtol=1e-5, atol=0)
    else:
        assert losses.tokens == 24 * 4  # three words and EOS a row
    assert abs(losses.dense - losses.all_experts) < 1e-4 < abs(losses.top_k - losses.dense)
    text = "\n".join(losses.lines())
    assert f"{losses.dense:.4f}" in text and f"3 of 8 experts       {losses.top_k:.4f}" in text
    assert "tokenizer.json" in {path.name for path in (tmp_path / "target").iterdir()}


def test_data_without_text_or_tokenizer_is_refused_before_anything_is_written(llama, tmp_path):
    source = Path(shutil.copytree(llama, tmp_path / "source"))
    (tmp_path / "data.txt").write_text("w1 w2")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xe9")
    (tmp_path / "half.jsonl").write_text('{"text": ')
    with pytest.raises(CheckpointError, match="source has no tokenizer that can be used"):
        upcycled(source, tmp_path / "target", data=tmp_path / "data.txt")
    tiny_tokenizer().save_pretrained(source)
    for name, message in [
        ("none.txt", "is not a file"),
        ("empty.txt", "no two tokens"),
        ("latin.txt", "not text in UTF-8"),
        ("half.jsonl", "half.jsonl, line 1: not JSON"),
    ]:
        with pytest.raises(UserError, match=message):
            upcycled(source, tmp_path / "target", data=tmp_path / name)
    assert not (tmp_path / "target").exists()


def run_command(*arguments):
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def test_the_command_upcycles_and_reports(llama, tmp_path):
    source = Path(shutil.copytree(llama, tmp_path / "source"))
    tiny_tokenizer().save_pretrained(source)
    (tmp_path / "data.txt").write_text("w1 w2 w3 w4")
    numbers = ["--to", "upcycle", "--experts", 8, "--shared-experts", 2, "--top-k", 3]
    result = run_command(source, tmp_path / "target", *numbers, "--verify", "--data", tmp_path / "data.txt")
    assert result.exit_code == 0, result.output
    assert "with all experts active, logits differ from the dense model's by " in result.stdout
    assert "loss of 3 tokens before training:" in result.stdout
    dry = run_command(source, tmp_path / "dry", *numbers, "--dry-run")
    assert "model.layers.1.mlp.experts.7.down_proj.weight F32 [32, 8] 1024 bytes <- splitfeedforward" in dry.stdout
    assert not (tmp_path / "dry").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "upcycle"], "the format 'upcycle' needs experts, shared_experts and top_k"),
        (["--to", "upcycle", "--experts", 8], "upcycle needs --shared-experts, --top-k as well"),
        (["--to", "bf16", "--top-k", 2, "--experts", 8, "--shared-experts", 2], "upcycle belongs to the format"),
        (["--to", "bf16", "--data", "a.txt"], "data belongs to the format 'upcycle', not to 'bf16'"),
        (
            ["--to", "upcycle", "--mp", 2, "--top-k", 2, "--experts", 8, "--shared-experts", 2],
            "mp=2 does not belong to the format 'upcycle'",
        ),
        (["--to", "upcicle"], "is not one of bf16, fp8"),
    ],
    ids=["no numbers", "one number", "another format", "data for another", "ranks", "a typing error"],
)
def test_options_that_do_not_fit_together_are_one_line(arguments, message, llama, tmp_path):
    result = run_command(llama, tmp_path / "target", *arguments)
    assert result.exit_code == 1 and message in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "target").exists()
