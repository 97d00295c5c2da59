"""The command line: what it prints, where, and with which exit code."""

import subprocess
import sys
import types

import pytest
import yaml
from tiny_run import tiny_base, tiny_values
from typer.testing import CliRunner

from modeling_deepseek_moe import CheckpointError, __version__
from modeling_deepseek_moe.cli.main import app, main
from modeling_deepseek_moe.finetune.errors import RecipeError
from modeling_deepseek_moe.finetune.recipe.keys import recipe_keys
from modeling_deepseek_moe.finetune.recipe.load import SHIPPED, load_recipe


def call(*arguments, **options):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], **options)


def run_failing_with(monkeypatch, error, *more):
    """Let the work behind `finetune` end with `error`, so that only the reporting is tested."""

    def run(recipe):
        raise error

    monkeypatch.setitem(sys.modules, "modeling_deepseek_moe.finetune.train.one_run", types.SimpleNamespace(run=run))
    return call("finetune", "lora_all", "data=rows.jsonl", "output_dir=out", *more)


def test_help_lists_the_verbs():
    result = call("--help")
    assert result.exit_code == 0
    assert "finetune" in result.stdout and "demo" in result.stdout


def test_no_verb_shows_the_help_and_counts_as_wrong():
    result = call()
    assert result.exit_code == 2
    assert "Usage" in result.output


def test_the_version_is_the_packages():
    assert call("--version").stdout.strip() == __version__


@pytest.mark.parametrize(
    "arguments", [["finetune"], ["finetune", "lora_all", "--fast"], ["finetuen"], ["demo", "--hub"]], ids=" ".join
)
def test_wrong_arguments_exit_with_2(arguments):
    result = call(*arguments)
    assert result.exit_code == 2
    assert "Usage: " in result.output


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["absent.yaml"], "cannot read recipe absent.yaml: No such file or directory"),
        (["lora_all"], "the recipe lacks `data`"),
        (
            ["lora_all", "data=d", "output_dir=o", "lr=1"],
            "unknown recipe key `lr`: did you mean `training.learning_rate`?",
        ),
        (["lora_all", "data"], "'data' is not of the form key=value"),
    ],
    ids=["no file", "no data", "unknown key", "no value"],
)
def test_a_bad_recipe_is_one_line_on_stderr(arguments, message):
    result = call("finetune", *arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("error", [RecipeError("first\nsecond"), CheckpointError("first\nsecond")], ids=repr)
def test_errors_of_ours_become_one_line(monkeypatch, error):
    result = run_failing_with(monkeypatch, error)
    assert (result.exit_code, result.stderr) == (1, "first second\n")


VERBS = [
    "finetune",
    "recipes",
    "keys",
    "experts",
    "evaluate",
    "chat",
    "convert",
    "push",
    "plan",
    "demo",
    "esft score",
    "esft select",
]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_can_show_the_whole_of_an_error(verb):
    assert "--traceback" in call(*verb.split(), "--help", env={"COLUMNS": "200"}).stdout


def test_an_error_is_shown_whole_with_its_cause_if_asked_for(tmp_path):
    code = (
        "import sys; from modeling_deepseek_moe.cli.main import main\n"
        "sys.argv = ['deepseek-moe', 'finetune', 'lora_all', 'data=d', f'output_dir={sys.argv[1]}/run', "
        "f'model={sys.argv[1]}/model', *sys.argv[2:]]\n"
        "main()"
    )
    (tmp_path / "model").mkdir()
    command = [sys.executable, "-c", code, str(tmp_path), "--traceback"]
    whole = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert whole.returncode == 1
    assert f"UserError: cannot load model '{tmp_path}/model': " in whole.stderr.splitlines()[-1]
    assert whole.stderr.count("Traceback (most recent call last):") > 1
    assert "was the direct cause of the following exception" in whole.stderr


@pytest.mark.parametrize("error", [RecipeError("first\nsecond"), CheckpointError("first\nsecond")], ids=repr)
def test_asked_for_a_traceback_the_error_itself_ends_the_command(monkeypatch, error):
    result = run_failing_with(monkeypatch, error, "--traceback")
    assert result.exception is error


def test_markup_in_a_message_is_printed_as_it_is(monkeypatch):
    result = run_failing_with(monkeypatch, RecipeError("a row has [red]text[/red]"))
    assert result.stderr == "a row has [red]text[/red]\n"


def test_ctrl_c_exits_with_130_and_says_what_is_saved(monkeypatch):
    result = run_failing_with(monkeypatch, KeyboardInterrupt("stopped: out/checkpoint-2 is saved"))
    assert (result.exit_code, result.stderr) == (130, "\nstopped: out/checkpoint-2 is saved\n")


def test_an_error_of_another_kind_keeps_its_traceback(monkeypatch):
    result = run_failing_with(monkeypatch, ZeroDivisionError("a bug"))
    assert isinstance(result.exception, ZeroDivisionError)


def test_a_recipe_runs_from_the_command_line(tmp_path):
    values = tiny_values(tmp_path, tiny_base(tmp_path / "base"))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    result = call("finetune", tmp_path / "recipe.yaml", "training.max_steps=2", "lora.targets=[attention]")
    assert result.exit_code == 0, result.output
    assert "held-out loss" in result.stdout
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_demo_passes_its_options_on(monkeypatch, tmp_path):
    seen = {}
    module = types.SimpleNamespace(run_demo=lambda **options: seen.update(options))
    monkeypatch.setitem(sys.modules, "modeling_deepseek_moe.finetune.demo.one_demo", module)
    assert call("demo", "--output-dir", tmp_path, "--hub-id", "me/demo").exit_code == 0
    assert seen == {"output_dir": tmp_path, "hub_id": "me/demo"}
    assert call("demo").exit_code == 0
    assert seen == {"output_dir": None, "hub_id": None}


def test_the_entry_point_takes_its_arguments_from_the_shell(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["deepseek-moe", "--version"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 0
    assert capsys.readouterr().out.strip() == __version__


def test_help_imports_nothing_that_only_training_needs():
    code = (
        "import sys; from typer.testing import CliRunner; from modeling_deepseek_moe.cli.main import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "print(*sorted({'peft', 'datasets', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


def test_recipes_are_listed_and_printed():
    listed = call("recipes")
    assert [line.split()[0] for line in listed.stdout.splitlines()] == list(SHIPPED)
    assert call("recipes", "lora_all").stdout == SHIPPED["lora_all"].read_text()
    wrong = call("recipes", "lora_al")
    assert (wrong.exit_code, wrong.stderr) == (1, "no recipe is named 'lora_al': did you mean 'lora_all'?\n")


def test_keys_are_shown_with_type_default_and_a_line():
    shown = call("keys", "bias_update")
    assert shown.stdout.splitlines()[0] == "bias_update_speed  float = 0.0"
    assert shown.stdout.splitlines()[1].startswith("    Step of the router's balancing bias")
    assert "did you mean `bias_update_speed`?" in call("keys", "bias_updat_speed").stderr


def test_the_help_of_finetune_ends_with_every_key():
    shown = call("finetune", "--help").stdout
    assert all(f"\n{key.name}  " in shown for key in recipe_keys())


def test_the_shell_completes_verbs_recipes_and_keys():
    def completions(line):
        variables = {"_DEEPSEEK_MOE_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
        return call(env=variables, prog_name="deepseek-moe").stdout.split()

    assert completions("deepseek-moe fine") == ["finetune"]
    assert completions("deepseek-moe finetune lora_s") == ["lora_shared"]
    assert "training.learning_rate=" in completions("deepseek-moe finetune lora_all training.le")


def test_a_key_with_dashes_is_answered_by_how_keys_are_written():
    result = call("finetune", "lora_all", "--data", "rows.jsonl", "output_dir=o", env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert "keys of a recipe have no dashes in front: data=rows.jsonl" in result.output


def test_plan_told_the_other_way_round_says_so():
    result = call("plan", "lora_all", "deepseek-v2-lite")
    assert (
        "lora_all is a recipe: name the model first (`deepseek-moe plan deepseek-v2-lite lora_all`)" in result.stderr
    )


def test_a_runs_folder_is_its_recipe_wherever_it_has_moved(tmp_path):
    (tmp_path / "recipe.yaml").write_text("{model: m, data: d, output_dir: elsewhere, seed: 7}")
    recipe = load_recipe(tmp_path, ["hub_id=me/name"])
    assert (recipe.seed, recipe.hub_id, recipe.output_dir) == (7, "me/name", str(tmp_path))
