"""Where this package comes from, as cards and messages say it: never by a name that anybody could register."""

import importlib.metadata
import re
from email.message import Message

import pytest
from places import ROOT

from modeling_deepseek_moe.distribution import NAME, how_to_install, install

ADDRESS = "https://git.example.org/moe/deepseek-moe"
BY_NAME = re.compile(rf"""pip install[^\n]*?["'\s]{NAME}\b(?! @ )""")
FOLDERS = ("modeling_deepseek_moe", "conversion", "finetune", "model_cards")


@pytest.fixture
def metadata(monkeypatch):
    """The package as installed from a pyproject.toml with other fields."""
    found = Message()
    monkeypatch.setattr(importlib.metadata, "metadata", lambda name: found)
    return found


def test_the_address_in_pyproject_is_what_one_installs_from(metadata):
    metadata["Project-URL"] = "Documentation, https://docs.example.org"
    metadata["Project-URL"] = f"Repository, {ADDRESS}"
    assert how_to_install() == f'pip install "deepseek-moe @ git+{ADDRESS}"'


@pytest.mark.parametrize(
    "urls", [[], ["Repository, https://repository.invalid/deepseek-moe"]], ids=["none", "placeholder"]
)
def test_without_an_address_nobody_is_sent_anywhere(metadata, urls):
    for url in urls:
        metadata["Project-URL"] = url
    assert how_to_install() == "the package deepseek-moe, installed from its repository"


def test_a_missing_library_is_installed_in_a_release_that_fits(metadata):
    metadata["Requires-Dist"] = 'lm-eval>=0.4.9; extra == "evaluate"'
    metadata["Requires-Dist"] = "trl-extras"
    metadata["Requires-Dist"] = 'trl>=1.10; extra == "finetune"'
    assert install("lm_eval") == "pip install 'lm-eval>=0.4.9'"
    assert install("trl") == "pip install 'trl>=1.10'"
    assert install("unknown") == "pip install 'unknown'"


def test_a_checkout_that_is_not_installed_can_still_say_it(monkeypatch):
    def metadata(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "metadata", metadata)
    assert how_to_install() == "the package deepseek-moe, installed from its repository"
    assert install("matplotlib") == "pip install 'matplotlib'"


def test_the_installed_package_knows_its_libraries():
    assert install("matplotlib") == "pip install 'matplotlib>=3.9'"


def test_the_name_is_that_of_pyproject_and_the_address_stands_there_alone():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'name = "{NAME}"' in text
    assert len(re.findall(r"^Repository = \"https://", text, re.M)) == 1


def test_no_card_and_no_message_says_to_install_it_by_its_bare_name():
    assert BY_NAME.search("pip install deepseek-moe") and BY_NAME.search("pip install 'deepseek-moe[finetune]'")
    assert not BY_NAME.search('pip install "deepseek-moe @ git+https://x"')
    files = [
        path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".md", ".jinja")
    ]
    assert len(files) > 100
    for path in [*files, ROOT / "README.md"]:
        assert not BY_NAME.search(path.read_text(encoding="utf-8")), path
