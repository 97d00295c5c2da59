"""What Windows and macOS lack, or do otherwise: modules that only POSIX has, and worker processes that start anew."""

import pickle
import subprocess
import sys

import pytest
import torch
from places import SUPPORT
from tiny_run import tiny_tokenizer

from modeling_deepseek_moe.finetune import Collator

ROWS = [{"input_ids": [0, 5, 6, 1], "labels": [-100, 5, 6, 1]}, {"input_ids": [0, 7], "labels": [-100, 7]}]

# Only imports by this package fail; other libraries look for themselves what the system has.
ON_ANOTHER_SYSTEM = """
import builtins, importlib, pkgutil, sys
real = builtins.__import__
def import_(name, globals=None, *rest, **options):
    ours = (globals or {}).get("__name__", "").startswith("modeling_deepseek_moe")
    if ours and name.partition(".")[0] in ("fcntl", "resource", "termios", "pwd", "grp", "posix"):
        raise ImportError(f"{name} is not on this system, and {globals['__name__']} imports it")
    return real(name, globals, *rest, **options)
builtins.__import__ = import_
import modeling_deepseek_moe.conversion as conversion, modeling_deepseek_moe.finetune as finetune
for package in (finetune, conversion):
    for name in package.__all__:
        getattr(package, name)
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if ".metrics." not in found.name:
            importlib.import_module(found.name)
from modeling_deepseek_moe.finetune.train.summary import peak_memory
print(len(finetune.__all__))
"""


def test_everything_imports_without_the_modules_that_only_posix_has():
    done = subprocess.run([sys.executable, "-c", ON_ANOTHER_SYSTEM], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20


def test_a_conversion_without_file_locks_is_refused_before_anything_is_written(tmp_path, monkeypatch, bf16):
    from modeling_deepseek_moe.conversion import ConversionError, convert

    monkeypatch.setitem(sys.modules, "fcntl", None)
    with pytest.raises(ConversionError, match="run it on Linux or macOS"):
        convert(bf16, tmp_path / "target", "fp8")
    assert not (tmp_path / "target").exists()


def test_the_collator_comes_out_of_a_pickle_as_it_went_in():
    collate = Collator(tiny_tokenizer(), pad_to_multiple_of=8)
    again = pickle.loads(pickle.dumps(collate))
    one, other = collate(ROWS), again(ROWS)
    assert one.keys() == other.keys() and one["labels"].shape == (2, 8)
    assert all(torch.equal(one[key], other[key]) for key in one)


LOADER = """
import torch
from tiny_run import tiny_tokenizer
from modeling_deepseek_moe.finetune import Collator

if __name__ == "__main__":
    rows = [{"input_ids": [0, 5, 6, 1], "labels": [-100, 5, 6, 1]}, {"input_ids": [0, 7], "labels": [-100, 7]}]
    loader = torch.utils.data.DataLoader(
        rows, batch_size=2, num_workers=1, multiprocessing_context="spawn", collate_fn=Collator(tiny_tokenizer())
    )
    print(next(iter(loader))["labels"].tolist())
"""


@pytest.mark.slow
def test_a_data_loader_with_spawned_workers_collates(tmp_path):
    (tmp_path / "program.py").write_text(LOADER)
    done = subprocess.run(
        [sys.executable, tmp_path / "program.py"],
        env={"PYTHONPATH": str(SUPPORT), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[[-100, 5, 6, 1], [-100, 7, -100, -100]]"
