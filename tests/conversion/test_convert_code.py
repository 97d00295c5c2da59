"""Python that lies beside a checkpoint: only a tokenizer's own is taken along, and no config names what is not."""

import json

import pytest
from tiny import tiny_config, tiny_model

from modeling_deepseek_moe.conversion import convert

TOKENIZER_CODE = "from .helper import x\n\n\nclass Mine: ...\n"


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    tiny_model(tiny_config("v3")).save_pretrained(folder)
    for name in ("modeling_stranger.py", "setup.py", "conftest.py"):
        (folder / name).write_text("raise SystemExit\n")
    fields = json.loads((folder / "config.json").read_text())
    code = {"AutoModelForCausalLM": "modeling_stranger.Model", "AutoConfig": "them/elsewhere--configuration.Config"}
    (folder / "config.json").write_text(json.dumps(fields | {"auto_map": code}))
    return folder


def python_of(folder):
    return sorted(path.name for path in folder.glob("*.py"))


def test_a_strangers_code_stays_where_it_is(source, tmp_path):
    convert(source, tmp_path / "target", "bf16")
    assert python_of(tmp_path / "target") == []
    fields = json.loads((tmp_path / "target" / "config.json").read_text())
    assert fields["auto_map"] == {"AutoConfig": "them/elsewhere--configuration.Config"}


def test_the_code_of_a_tokenizer_that_is_code_comes_along(source, tmp_path):
    (source / "tokenization_mine.py").write_text(TOKENIZER_CODE)
    (source / "helper.py").write_text("x = 1\n")
    config = {"auto_map": {"AutoTokenizer": ["tokenization_mine.Mine", None]}}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    convert(source, tmp_path / "target", "bf16")
    assert python_of(tmp_path / "target") == ["helper.py", "tokenization_mine.py"]


@pytest.mark.parametrize("code", ["../outside.Mine", "a/b.Mine", "absent.Mine", "them/elsewhere--mine.Mine"])
def test_a_name_that_leads_elsewhere_takes_nothing_along(source, tmp_path, code):
    (tmp_path / "outside.py").write_text("x = 1\n")
    (source / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": [code, None]}}))
    convert(source, tmp_path / "target", "bf16")
    assert python_of(tmp_path / "target") == []
