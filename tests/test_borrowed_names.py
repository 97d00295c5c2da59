"""What the package borrows from other libraries beyond what they document: it is there, listed, and in one place."""

import ast
import importlib
import inspect
import pkgutil
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from places import ROOT
from transformers.dynamic_module_utils import get_relative_import_files

import modeling_deepseek_moe
from modeling_deepseek_moe._compat import BORROWED, EXPORTED, Borrowed
from modeling_deepseek_moe.finetune import _compat as finetune_compat

LIBRARIES = ("transformers", "peft", "trl", "accelerate", "torch", "huggingface_hub", "datasets", "lm_eval")
# What these document is at their top; what is only in a submodule they move as they like.
DOCUMENTED_AT_THE_TOP = ("transformers", "peft", "trl")
FOLDERS = ("modeling_deepseek_moe", "finetune", "conversion", "model_cards")
HOMES = [ROOT / "modeling_deepseek_moe/_compat.py", ROOT / "finetune/_compat.py"]
LISTED = {HOMES[0]: BORROWED, HOMES[1]: finetune_compat.BORROWED}
ALL = [*BORROWED, *finetune_compat.BORROWED, *EXPORTED]
OF_THE_STANDARD_LIBRARY = {"_getframe", "_replace", "_asdict", "_fields", "_make"}
PUT_THERE_BY_METACLASSES = {"_abc_impl", "_is_protocol", "_backward_cls"}


def problem_of(borrowed: Borrowed) -> str | None:
    """What a release has moved, None if nothing."""
    where = f"{borrowed.module} has no {borrowed.name} (borrowed: {borrowed.reason})"
    found = importlib.import_module(borrowed.module)
    if borrowed.name.startswith("."):
        return None if re.search(rf"\b{borrowed.name[1:]}\b", inspect.getsource(found)) else where
    for name in borrowed.name.split("."):
        if not hasattr(found, name):
            return where
        found = getattr(found, name)
    if borrowed.parameters:
        taken = inspect.signature(found).parameters
        lost = [name for name in borrowed.parameters if name not in taken]
        if lost:
            return f"{borrowed.module}: {borrowed.name} takes no {', '.join(lost)} (borrowed: {borrowed.reason})"
    return None


def files_of_the_package() -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def exported_files() -> set[Path]:
    main = ROOT / "modeling_deepseek_moe/modeling_deepseek_moe.py"
    return {main, *map(Path, get_relative_import_files(main))}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def private_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and name of each private name in a file that the file does not define itself."""
    own = set(OF_THE_STANDARD_LIBRARY)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is(node.value, "self"):
            own.add(node.attr)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            of_base = isinstance(node.value, ast.Call) and _is(node.value.func, "super")
            if of_base or node.attr not in own:
                yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module.split(".")[0] in LIBRARIES:
            yield from ((node.lineno, alias.name) for alias in node.names if is_private(alias.name))
            if any(is_private(part) for part in node.module.split(".")):
                yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", None) in ("getattr", "hasattr", "setattr"):
            name = node.args[1].value if isinstance(node.args[1], ast.Constant) else ""
            if is_private(name) and name not in own:
                yield node.lineno, name
        elif isinstance(node, ast.ClassDef):
            # What a class sets and the file never reads is there for a library.
            for line in node.body:
                for target in line.targets if isinstance(line, ast.Assign) else ():
                    if isinstance(target, ast.Name) and is_private(target.id):
                        yield line.lineno, target.id


def _is(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def parts_of(borrowed: tuple[Borrowed, ...]) -> set[str]:
    return {part for each in borrowed for part in each.name.split(".")}


def modules_of_the_package() -> list[types.ModuleType]:
    found = pkgutil.walk_packages(modeling_deepseek_moe.__path__, "modeling_deepseek_moe.")
    return [importlib.import_module(each.name) for each in found if not each.name.endswith("__main__")]


@pytest.mark.parametrize("borrowed", ALL, ids=lambda each: f"{each.module}:{each.name}")
def test_what_is_borrowed_is_where_it_was(borrowed):
    assert problem_of(borrowed) is None


@pytest.mark.parametrize(
    ("borrowed", "owner"),
    [
        ("_default_apply_gate", "transformers.integrations.moe"),
        ("LoraConfig._register_custom_module", "peft.LoraConfig"),
        ("DPOTrainer._prepare_dataset", "trl.DPOTrainer"),
        ("_C._current_graph_task_id", "torch._C"),
        ("PreTrainedModel._load_pretrained_model", "transformers.PreTrainedModel"),
    ],
)
def test_a_release_without_a_borrowed_name_is_told_by_that_name(borrowed, owner, monkeypatch):
    row = next(each for each in ALL if each.name == borrowed)
    module, _, attribute = owner.rpartition(".")
    holder = sys.modules.get(owner) or getattr(importlib.import_module(module), attribute)
    name = borrowed.rpartition(".")[2]
    monkeypatch.setattr(holder, f"renamed{name}", getattr(holder, name), raising=False)
    monkeypatch.delattr(holder, name)
    assert problem_of(row) == f"{row.module} has no {borrowed} (borrowed: {row.reason})"


def test_a_release_that_renames_an_attribute_of_objects_is_told_by_that_name(monkeypatch, tmp_path):
    row = next(each for each in ALL if each.name == "._is_accelerate_prepared")
    source = inspect.getsource(importlib.import_module(row.module))
    (tmp_path / "renamed.py").write_text(source.replace("_is_accelerate_prepared", "_prepared"), encoding="utf-8")
    fake = types.ModuleType(row.module)
    fake.__file__ = str(tmp_path / "renamed.py")
    monkeypatch.setitem(sys.modules, row.module, fake)
    assert "._is_accelerate_prepared" in problem_of(row)


def test_a_release_that_renames_a_parameter_is_told_by_that_name(monkeypatch):
    row = next(each for each in ALL if each.name == "PreTrainedModel._load_pretrained_model")

    def renamed(model, state_dict, checkpoint_files, loading, expected_keys=None):
        """The signature of a later release."""

    monkeypatch.setattr("transformers.PreTrainedModel._load_pretrained_model", staticmethod(renamed))
    assert "PreTrainedModel._load_pretrained_model takes no load_config" in problem_of(row)


def test_each_name_is_listed_once_with_a_reason():
    for borrowed in (BORROWED, finetune_compat.BORROWED, EXPORTED):
        assert len({(each.module, each.name) for each in borrowed}) == len(borrowed)
        assert all(each.reason for each in borrowed)


def test_private_names_of_other_libraries_are_used_in_one_place_and_are_listed():
    exported, strays = exported_files(), []
    for path in files_of_the_package():
        allowed = parts_of(EXPORTED if path in exported else LISTED.get(path, ()))
        for line, name in private_names(ast.parse(path.read_text(encoding="utf-8"))):
            if name not in allowed:
                strays.append(f"{path.relative_to(ROOT)}:{line}: {name}")
    assert strays == []


def test_a_private_name_in_any_other_file_would_be_found():
    code = """
import torch
from peft.tuners._tools import lend
torch._C._go()
getattr(model, "_flag")
class A(B):
    _tied = 1
    def _save(self):
        super()._save(self._theirs)
        self._own = 1
        self._save(self._own)
"""
    names = {name for _, name in private_names(ast.parse(code))}
    assert names == {"lend", "_C", "_go", "_flag", "_tied", "_save", "_theirs"}


def test_methods_of_ours_that_override_private_ones_are_listed():
    strays = set()
    for module in modules_of_the_package():
        for cls in vars(module).values():
            if not isinstance(cls, type) or cls.__module__ != module.__name__:
                continue
            for place, base in enumerate(cls.__mro__):
                if not base.__module__.startswith("modeling_deepseek_moe"):
                    continue
                file = Path(inspect.getfile(base))
                allowed = parts_of(EXPORTED if file in exported_files() else LISTED.get(file, ()))
                for name in filter(is_private, vars(base)):
                    if name in PUT_THERE_BY_METACLASSES or name in allowed:
                        continue
                    theirs = [other for other in cls.__mro__[place + 1 :] if name in vars(other)]
                    if any(other.__module__.split(".")[0] in LIBRARIES for other in theirs):
                        strays.add(f"{base.__qualname__}.{name}")
    assert sorted(strays) == []


def test_names_that_are_only_in_a_submodule_of_a_library_are_listed():
    exported, strays = exported_files(), []
    for path in files_of_the_package():
        rows = EXPORTED if path in exported else [*BORROWED, *finetune_compat.BORROWED]
        listed = {(each.module, each.name) for each in rows}
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or node.level or "." not in node.module:
                continue
            library = node.module.split(".")[0]
            if library not in DOCUMENTED_AT_THE_TOP:
                continue
            for alias in node.names:
                found = getattr(importlib.import_module(node.module), alias.name)
                at_the_top = getattr(importlib.import_module(library), alias.name, None) is found
                is_listed = (node.module, alias.name) in listed
                if not (at_the_top or is_listed or isinstance(found, types.ModuleType)):
                    strays.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.module}.{alias.name}")
    assert strays == []


def test_torch_still_knows_whether_a_backward_pass_runs():
    seen = []
    weight = torch.ones(2, requires_grad=True)
    weight.register_hook(lambda grad: seen.append(finetune_compat.is_in_backward()))
    weight.sum().backward()
    assert seen == [True]
    assert not finetune_compat.is_in_backward()
