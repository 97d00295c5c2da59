"""Importing the package is cheap, and whoever needs it registered finds it registered, in whatever order."""

import importlib
import json
import pickle
import subprocess
import sys

import pytest
from tiny import tiny_config

import modeling_deepseek_moe
from modeling_deepseek_moe import import_hook
from modeling_deepseek_moe.lazy import hand_out

HEAVY = ("torch", "transformers", "peft", "datasets", "numpy")


def in_a_new_process(code: str, **options) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "statement",
    [
        "import modeling_deepseek_moe, modeling_deepseek_moe.finetune, modeling_deepseek_moe.conversion",
        "from modeling_deepseek_moe import UserError, CheckpointError",
        "from modeling_deepseek_moe.finetune import RecipeError",
    ],
)
def test_importing_the_packages_and_their_errors_imports_nothing_heavy(statement):
    found = in_a_new_process(f"import sys\n{statement}\nprint(*(name for name in {HEAVY} if name in sys.modules))")
    assert found.strip() == ""


@pytest.mark.parametrize(
    "arguments", [["--help"], ["-h"], ["finetun"], ["esft", "-h"], ["push", "--help"]], ids=" ".join
)
def test_help_and_a_wrong_verb_import_nothing_heavy(arguments):
    code = f"""
import sys
from modeling_deepseek_moe.cli.main import main
sys.argv = ["deepseek-moe", *{arguments}]
try:
    main()
except SystemExit as end:
    print("\\nended", end.code, *(name for name in {HEAVY} if name in sys.modules))
"""
    assert in_a_new_process(code).splitlines()[-1] == f"ended {2 if arguments == ['finetun'] else 0}"


# What a user's program may begin with, and what it does then; each ends with a model of the family.
PROGRAMS = {
    "the package before the Auto classes": """
import modeling_deepseek_moe
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(folder)
""",
    "the Auto classes before the package": """
from transformers import AutoModelForCausalLM
import modeling_deepseek_moe
model = AutoModelForCausalLM.from_pretrained(folder)
""",
    "transformers, the package, and only then what is in it": """
import transformers
import modeling_deepseek_moe
assert not any(name in sys.modules for name in modeling_deepseek_moe.import_hook.REGISTRIES)
model = transformers.AutoModelForCausalLM.from_pretrained(folder)
""",
    "a configuration first": """
import modeling_deepseek_moe
from transformers import AutoConfig
config = AutoConfig.from_pretrained(folder)
assert type(config) is modeling_deepseek_moe.DeepseekMoeConfig
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_config(config)
""",
    "a class of the package, from its own file": """
from modeling_deepseek_moe.modeling_deepseek_moe import DeepseekMoeForCausalLM
model = DeepseekMoeForCausalLM.from_pretrained(folder)
""",
    "a library that brings transformers along": """
import modeling_deepseek_moe
import peft
from transformers import AutoModelForCausalLM, Trainer, pipeline
model = AutoModelForCausalLM.from_pretrained(folder)
""",
    "a pickled configuration": """
import pickle
with open(folder + "/config.pickle", "rb") as file:
    config = pickle.load(file)
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_config(config)
""",
    "native types handed over before anything else": """
import modeling_deepseek_moe
modeling_deepseek_moe.register(replace_native=True)
from transformers import AutoConfig, AutoModelForCausalLM
assert type(AutoConfig.for_model("deepseek_v3")) is modeling_deepseek_moe.DeepseekMoeConfig
model = AutoModelForCausalLM.from_pretrained(folder)
""",
}
END = """
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
watching = [finder for finder in sys.meta_path if type(finder).__module__.endswith("import_hook")]
print(json.dumps({
    "class": type(model).__module__ + "." + type(model).__qualname__,
    "experts": model.config._experts_implementation,
    "kernels": ["triton" in ALL_EXPERTS_FUNCTIONS, "mla_triton" in ALL_ATTENTION_FUNCTIONS],
    "watching": len(watching),
}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A saved model, and its configuration pickled beside it."""
    folder = tmp_path_factory.mktemp("model")
    modeling_deepseek_moe.DeepseekMoeForCausalLM(tiny_config("v3")).save_pretrained(folder)
    (folder / "config.pickle").write_bytes(pickle.dumps(tiny_config("v3")))
    return str(folder)


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_family_is_registered_whatever_is_imported_first(program, folder):
    begin = f"import json, sys\nfolder = {folder!r}\n"
    found = json.loads(in_a_new_process(begin + PROGRAMS[program] + END).splitlines()[-1])
    assert found == {
        "class": "modeling_deepseek_moe.modeling_deepseek_moe.DeepseekMoeForCausalLM",
        "experts": "sorted_mm",
        "kernels": [True, True],
        "watching": 0,
    }


def test_a_model_of_transformers_own_finds_the_kernels():
    code = """
import modeling_deepseek_moe
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
sizes = dict(hidden_size=16, num_hidden_layers=1, vocab_size=8, num_experts=2, num_experts_per_tok=1, head_dim=8)
sizes |= dict(num_attention_heads=2, num_key_value_heads=1, moe_intermediate_size=8)
model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes))
model.set_experts_implementation("sorted_mm")
import torch
print(model(torch.tensor([[1, 2]])).logits.shape)
"""
    assert "torch.Size([1, 2, 8])" in in_a_new_process(code)


def write_modules(folder, **sources: str) -> None:
    folder.mkdir()
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(source)


def test_the_hook_calls_once_and_only_when_no_module_is_half_imported(tmp_path, monkeypatch):
    write_modules(
        tmp_path / "watched",
        __init__="",
        outer="from . import registry\nfrom hook_test_log import seen\nseen.append('outer goes on')\nDONE = True\n",
        registry="from . import outer\nfrom hook_test_log import seen\nseen.append('registry')\n",
        later="",
    )
    (tmp_path / "hook_test_log.py").write_text("seen = []\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(import_hook, "REGISTRIES", ("watched.registry",))
    monkeypatch.setattr(import_hook, "_COUNTED", ("watched",))
    log = importlib.import_module("hook_test_log")

    def register():
        log.seen.append(f"registered, outer is done: {sys.modules['watched.outer'].DONE}")

    before = list(sys.meta_path)
    try:
        import_hook.call_with_registries(register)
        assert len(sys.meta_path) == len(before) + 1
        importlib.import_module("watched")
        assert log.seen == []
        outer = importlib.import_module("watched.outer")
        assert log.seen == ["registry", "outer goes on", "registered, outer is done: True"]
        assert sys.meta_path == before
        assert type(outer.__loader__) is type(outer.__spec__.loader) is type(log.__loader__)
        importlib.import_module("watched.later")
        assert len(log.seen) == 3
        import_hook.call_with_registries(lambda: log.seen.append("at once"))
        assert log.seen[-1] == "at once"
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] in ("watched", "hook_test_log")]:
            del sys.modules[name]


def test_an_import_that_fails_leaves_the_hook_waiting(tmp_path, monkeypatch):
    write_modules(tmp_path / "watched", __init__="", broken="from . import registry\n1 / 0\n", registry="")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(import_hook, "REGISTRIES", ("watched.registry",))
    monkeypatch.setattr(import_hook, "_COUNTED", ("watched",))
    calls, before = [], list(sys.meta_path)
    try:
        import_hook.call_with_registries(lambda: calls.append("registered"))
        with pytest.raises(ZeroDivisionError):
            importlib.import_module("watched.broken")
        assert calls == []
        (tmp_path / "watched" / "sound.py").write_text("")
        importlib.invalidate_caches()
        importlib.import_module("watched.sound")
        assert calls == ["registered"]
    finally:
        sys.meta_path[:] = before
        for name in [name for name in sys.modules if name.partition(".")[0] == "watched"]:
            del sys.modules[name]


@pytest.mark.parametrize(
    "package", ["modeling_deepseek_moe", "modeling_deepseek_moe.finetune", "modeling_deepseek_moe.conversion"]
)
def test_every_public_name_is_there_and_in_dir(package):
    module = importlib.import_module(package)
    assert len(module.__all__) > 5 and set(module.__all__) <= set(dir(module))
    for name in module.__all__:
        value = getattr(module, name)
        assert getattr(value, "__name__", name) == name and value is getattr(module, name)


def test_a_name_that_a_package_does_not_have_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'modeling_deepseek_moe.finetune' has no attribute 'lora_confik'"):
        modeling_deepseek_moe.finetune.lora_confik  # noqa: B018
    get, names = hand_out("json", {"JSONDecoder": ".decoder"})
    assert get("JSONDecoder") is json.JSONDecoder and "JSONDecoder" in names() and "loads" in names()
