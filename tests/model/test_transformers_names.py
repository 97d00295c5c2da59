"""Every private or version-dependent name of transformers that the model uses stands in one list, and exists."""

import ast
from pathlib import Path

import pytest
import transformers
from borrowed import look_up
from test_hub_export import closure_of
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer

import modeling_deepseek_moe
from modeling_deepseek_moe.transformers_names import BORROWED, NEWEST_TRIED, OLDEST_TRIED, minor_release

PACKAGE = Path(modeling_deepseek_moe.__file__).parent
OWNERS = (PreTrainedModel, GenerationMixin, PreTrainedConfig, Cache, DynamicLayer, GradientCheckpointingLayer)


@pytest.mark.parametrize("name", BORROWED)
def test_a_borrowed_name_exists(name):
    look_up(name)
    assert BORROWED[name] and "\n" not in BORROWED[name]


@pytest.mark.parametrize(
    "name",
    [
        "transformers.modeling_utils.PreTrainedModel._load_pretrained_model",
        "transformers.generation.GenerationMixin._get_candidate_generator",
        "transformers.utils.output_capturing.capture_outputs",
    ],
)
def test_a_transformers_that_renames_one_is_told_by_that_name(name, monkeypatch):
    owner, _, attribute = name.rpartition(".")
    monkeypatch.setattr(look_up(owner), f"{attribute}_renamed", look_up(name), raising=False)
    monkeypatch.delattr(look_up(owner), attribute)
    with pytest.raises(LookupError, match=rf"^{name} is gone"):
        look_up(name)


def test_a_name_that_transformers_no_longer_asks_for_is_told_by_that_name():
    for name in ("transformers.modeling_utils:_never_was_there", "transformers.never_was_there.name"):
        with pytest.raises(LookupError, match=f"^{name} is gone"):
            look_up(name)


def private_names(source: str) -> set[str]:
    """Names with one leading underscore that a module reads from others, or gives to its classes."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.ClassDef):
            names |= {each.name for each in node.body if isinstance(each, ast.FunctionDef)}
            assigned = (each.targets[0] for each in node.body if isinstance(each, ast.Assign))
            names |= {each.id for each in assigned if isinstance(each, ast.Name)}
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr"):
            names |= {each.value for each in node.args if isinstance(each, ast.Constant)}
    return {name for name in names if isinstance(name, str) and name.startswith("_") and not name.startswith("__")}


def test_the_list_has_every_private_name_of_transformers_that_the_exported_files_use():
    listed = {name.replace(":", ".").rpartition(".")[2] for name in BORROWED}
    for file in closure_of("modeling_deepseek_moe.py", "configuration_deepseek_moe.py"):
        used = private_names((PACKAGE / file).read_text(encoding="utf-8"))
        of_transformers = {name for name in used if any(hasattr(owner, name) for owner in OWNERS)}
        of_torch = {name for name in of_transformers if hasattr(nn.Module, name)}
        assert of_transformers - of_torch <= listed, file


def test_the_installed_transformers_is_one_of_those_that_were_tried():
    assert OLDEST_TRIED <= minor_release(transformers.__version__) <= NEWEST_TRIED
