"""Import paths that README or CHANGELOG once named: they work, and say where what they name is now."""

import importlib
import runpy
import subprocess
import sys

import pytest
from places import ROOT

from modeling_deepseek_moe.moved import LEFT, MOVED

# As README and CHANGELOG had them, and where each name is now.
DOCUMENTED = {
    "from modeling_deepseek_moe.conversion.convert import convert": "conversion.one_conversion",
    "from modeling_deepseek_moe.finetune.callbacks import BalanceExperts": "finetune.model.balance",
    "from modeling_deepseek_moe.finetune.callbacks import MarkCheckpoints": "finetune.runs.checkpoints",
    "from modeling_deepseek_moe.finetune.lora import lora_config": "finetune.model.lora",
    "from modeling_deepseek_moe.finetune.watch_experts import watch_experts": "finetune.experts.watch",
}
UNCHANGED = [
    "from modeling_deepseek_moe.conversion import convert",
    "from modeling_deepseek_moe.expert_lora import load_adapter, register_expert_lora",
    "from modeling_deepseek_moe import DeepseekMoeConfig, DeepseekMoeForCausalLM, register",
]


@pytest.mark.parametrize("statement", DOCUMENTED)
def test_an_old_import_gives_the_same_object_and_a_warning_that_names_its_place(statement):
    name, home = statement.split()[-1], f"modeling_deepseek_moe.{DOCUMENTED[statement]}"
    found = {}
    with pytest.warns(DeprecationWarning, match=f"{name} moved: import it from {home}$") as caught:
        exec(statement, found)
    assert found[name] is getattr(importlib.import_module(home), name)
    # Of the line that has to change; libraries that are imported for the first time warn of their own.
    assert [warning.filename for warning in caught if " moved: " in str(warning.message)] == ["<string>"]


@pytest.mark.parametrize("statement", UNCHANGED)
@pytest.mark.filterwarnings("error:.* moved:")
def test_what_did_not_move_is_imported_without_a_warning(statement):
    exec(statement, {})


def test_a_name_that_was_never_there_is_an_error():
    with pytest.raises(ImportError, match="cannot import name 'absent'"):
        from modeling_deepseek_moe.finetune.lora import absent  # noqa: F401


def test_a_function_that_a_package_hands_out_survives_the_old_module_of_its_name():
    code = """
import warnings
warnings.simplefilter("ignore")
from modeling_deepseek_moe.finetune.watch_experts import watch_experts as old
from modeling_deepseek_moe.finetune import watch_experts as new
try:
    new()
except TypeError as error:
    print(error, old.__module__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    missing = "watch_experts() missing 1 required positional argument: 'trainer'"
    assert done.stdout.strip() == f"{missing} modeling_deepseek_moe.finetune.experts.watch"


@pytest.mark.parametrize("name", LEFT)
def test_a_script_that_left_the_package_says_where_it_is(name):
    assert (ROOT / LEFT[name].removeprefix("python ")).is_file()
    with pytest.raises(ImportError, match=r"no longer in the package: run `python model_cards/demo_base/.*\.py`"):
        runpy.run_module(name, run_name="__main__")


def test_no_old_name_hides_a_module_that_is_there():
    for name in [*MOVED, *LEFT]:
        package, _, leaf = name.rpartition(".")
        paths = importlib.import_module(package).__path__
        assert importlib.machinery.PathFinder.find_spec(name, paths) is None, leaf


def test_an_old_module_does_not_hide_the_function_of_its_name():
    with pytest.warns(DeprecationWarning, match="watch_experts moved"):
        exec("from modeling_deepseek_moe.finetune.watch_experts import watch_experts", {})
    assert callable(importlib.import_module("modeling_deepseek_moe.finetune").watch_experts)
