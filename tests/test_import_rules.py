"""Who may import whom, held to the whole source; `support/import_rules.py` has the rules and prints the table."""

import pytest
from import_rules import LEVEL_OF, House
from places import ROOT


@pytest.fixture(scope="module")
def house() -> House:
    return House()


def test_no_module_imports_what_its_wing_may_not(house):
    assert house.violations() == []


def test_no_modules_import_each_other_in_a_circle(house):
    assert house.circle() == []


def test_every_wing_has_a_level_and_every_level_its_wings(house):
    assert {house.wing(module) for module in house.files} == set(LEVEL_OF)


def test_contributing_has_the_table(house):
    assert house.table() in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


MODEL = "modeling_deepseek_moe/modeling_deepseek_moe.py"


@pytest.mark.parametrize(
    ("file", "statement", "others", "rule"),
    [
        ("finetune/data/rows.py", "from ..train import one_run", ["finetune/train/one_run.py"], "above it"),
        ("finetune/data/rows.py", "from ..train.one_run import run", ["finetune/train/one_run.py"], "above it"),
        ("finetune/data/rows.py", "from ..model.lora import WORDS", ["finetune/model/lora.py"], "beside it"),
        ("finetune/data/rows.py", "def f():\n    from ..model import lora", ["finetune/model/lora.py"], "beside it"),
        (
            "conversion/engine/plan.py",
            "import modeling_deepseek_moe.finetune.errors",
            ["finetune/errors.py"],
            "never imports finetune",
        ),
        (MODEL, "from .quantized.weights import BITS", ["modeling_deepseek_moe/quantized/weights.py"], "which is not"),
        ("finetune/data/rows.py", "from ... import cli", ["modeling_deepseek_moe/cli/__init__.py"], "command line"),
        (
            "finetune/train/one_run.py",
            "from modeling_deepseek_moe.model_cards import card",
            ["model_cards/card.py"],
            "may",
        ),
        (
            "model_cards/card.py",
            "from modeling_deepseek_moe.finetune.model.load import load",
            ["finetune/model/load.py"],
            "may not import",
        ),
    ],
    ids=lambda value: value.replace("\n", " ") if isinstance(value, str) and "import" in value else None,
)
def test_an_import_that_breaks_a_rule_is_named_with_its_line(file, statement, others, rule, tmp_path):
    for path in (MODEL, file, *others):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("")
    (tmp_path / file).write_text(f"# first line\n{statement}\n")
    found = House(tmp_path).violations()
    assert found and found[0].startswith(f"{file}:{3 if 'def' in statement else 2} ")
    assert any(rule in line for line in found)


def test_a_circle_of_modules_is_found(tmp_path):
    for path in (MODEL, "conversion/one.py"):
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).write_text("")
    for name, other in (("one", "two"), ("two", "three"), ("three", "one")):
        (tmp_path / "conversion" / f"{name}.py").write_text(f"from . import {other}\n")
    circle = [name.rpartition(".")[2] for name in House(tmp_path).circle()]
    assert circle == ["one", "two", "three", "one"]
