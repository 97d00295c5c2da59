"""Every command and every block of Python in the READMEs runs, from top to bottom, as it stands there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from dense_folders import dense_folder
from huggingface_hub import HfApi
from peft import get_peft_model
from readmes import COMMAND, READMES, ROOT, command_problem, typed_in
from tiny_run import counting_rows, tiny_base, tiny_tokenizer, write_jsonl
from torch.distributed.run import get_args_parser

from modeling_deepseek_moe import DeepseekMoeForCausalLM
from modeling_deepseek_moe.finetune import lora_config
from modeling_deepseek_moe.finetune.demo.local_hub import LocalHub
from modeling_deepseek_moe.finetune.recipe.load import SHIPPED

# Released models that a command loads: tiny ones of these names are on a local Hub, to which HF_ENDPOINT leads.
ON_THE_HUB = ("deepseek-ai/DeepSeek-V2-Lite", "deepseek-ai/DeepSeek-V2-Lite-Chat")
# What a reader puts in the place of a word in capitals. DST is a new folder for each command, RANKS the last of these.
PLACEHOLDERS = {
    "MODEL": "deepseek-ai/DeepSeek-V2-Lite",
    "SRC": "base",
    "BASE": "base",
    "TUNED": "tuned",
    "ADAPTER": "adapter",
    "LLAMA": "llama",
    "TEXT": "book.txt",
}
# What a reader types into a program that asks.
TYPED = "w1 w2\n/exit\n"
# Not run here, and what checks them instead.
NOT_RUN = {
    "make demo": "trains for minutes: tests/finetune/demo runs it; the Makefile has the target",
    'pip install ".[finetune]"': "would change the environment: pyproject.toml has the extra",
    'make benchmark ARGS="--routing FILE"': "measures for an hour: tests/test_benchmarks.py; the Makefile has it",
}
EVERYTHING = [typed for readme in READMES for typed in typed_in(readme)]


@pytest.mark.parametrize(
    "typed",
    [typed for typed in EVERYTHING if typed.text.startswith(f"{COMMAND} ") and "[" not in typed.text],
    ids=lambda typed: f"{typed.where} {typed.text}",
)
def test_the_command_line_takes_it(typed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "first").mkdir(parents=True)  # which earlier commands of the READMEs make
    for file in ("runs/first/recipe.yaml", "mine.yaml"):
        (tmp_path / file).write_text(f"data: rows.jsonl\noutput_dir: o\n{SHIPPED['lora_all'].read_text()}")
    assert command_problem(typed.text, may_lack=typed.kind == "prose") is None


@pytest.mark.parametrize(
    "command, problem",
    [
        ("deepseek-moe finetuen lora_all", "No such command"),
        ("deepseek-moe chat runs/first --greddy", "No such option"),
        ("deepseek-moe convert SRC DST", "Missing option"),
        ("deepseek-moe esft score MODEL", "Missing argument"),
        ("deepseek-moe finetune lora_al data=d output_dir=o", "did you mean 'lora_all'"),
        ("deepseek-moe finetune lora_all data=d output_dir=o training.lr=1", "unknown recipe key"),
        ("deepseek-moe plan deepseek-v2-lite lora_all max_lenght=3", "unknown recipe key"),
    ],
)
def test_a_command_that_would_not_run_is_noticed(command, problem):
    assert problem in command_problem(command)


# What these start has a process for each of several GPUs; `tests/finetune/train/test_two_machines.py` runs such lines.
LAUNCHERS = {"torchrun": get_args_parser, "accelerate": launch_command_parser}


@pytest.mark.parametrize(
    "typed",
    [typed for typed in EVERYTHING if typed.language == "bash" and not typed.text.startswith(f"{COMMAND} ")],
    ids=lambda typed: f"{typed.where} {typed.text}",
)
def test_what_other_programs_are_to_do_is_there(typed):
    program, *words = shlex.split(typed.text)
    if program == "make":
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif program == "pip":
        extras = re.findall(r"\[(\w+)\]", typed.text)
        assert all(f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text() for extra in extras)
    elif program in LAUNCHERS:
        given = LAUNCHERS[program]().parse_args(words[program == "accelerate" :])
        assert given.module and given.training_script == "modeling_deepseek_moe.cli"
        assert command_problem(shlex.join(["deepseek-moe", *given.training_script_args])) is None
    else:
        assert program == "python"
        script = (ROOT / words[0]).read_text()
        options = [word.removeprefix("--") for word in words if word.startswith("--")]
        assert all(option.replace("-", "_") in script for option in options)


def test_what_is_not_run_still_stands_in_a_readme():
    assert set(NOT_RUN) <= {typed.text for typed in EVERYTHING}


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with what a reader has at hand."""
    folder = tmp_path_factory.mktemp("desk")
    base = tiny_base(folder / "base", num_attention_heads=8)
    write_jsonl(folder / "rows.jsonl", counting_rows("messages", 64))
    for name in ("held_out", "math", "code"):
        write_jsonl(folder / f"{name}.jsonl", counting_rows("messages", 12))
    (folder / "book.txt").write_text(" ".join(f"w{number % 80}" for number in range(600)))
    model = DeepseekMoeForCausalLM.from_pretrained(base)
    adapted = get_peft_model(model, lora_config(model, targets=["attention", "shared_experts", "routed_experts"]))
    adapted.save_pretrained(folder / "adapter")
    model = DeepseekMoeForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2] += 1
    model.save_pretrained(folder / "tuned")
    dense_folder(folder / "llama", intermediate_size=128)
    tiny_tokenizer().save_pretrained(folder / "llama")
    return folder


@pytest.fixture(scope="module")
def environment(desk, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    with LocalHub(tmp_path_factory.mktemp("hub"), lfs=True) as hub:
        api = HfApi(endpoint=hub.endpoint, token="local")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
            for name in ON_THE_HUB:
                api.create_repo(name, private=False)
                api.upload_folder(repo_id=name, folder_path=desk / "base")
        variables = hub.environment(home)
        yield variables | {"PATH": f"{Path(sys.executable).parent}:{variables['PATH']}", "HF_TOKEN": "local"}


@pytest.mark.slow
@pytest.mark.parametrize("readme", READMES)
def test_a_readme_runs_from_top_to_bottom(readme, desk, environment):
    python, made = "", 0
    for typed in typed_in(readme):
        if typed.text in NOT_RUN or typed.text.split()[0] in LAUNCHERS or typed.kind == "prose":
            continue
        if typed.language == "python":
            python += f"{typed.text}\n"  # blocks go on from each other
            command, text = [sys.executable, "-c", python], typed.text
        else:
            made += "DST" in typed.text
            text = typed.text
            for word, value in {**PLACEHOLDERS, "DST": f"made-{made}", "RANKS": f"made-{made - 1}"}.items():
                text = re.sub(rf"\b{word}\b", value, text)
            command = ["bash", "-c", text]
        done = subprocess.run(
            command, cwd=desk, env=environment, input=TYPED, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"{typed.where}: {text}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
