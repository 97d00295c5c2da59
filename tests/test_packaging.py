"""What pip installs: the wheel's contents, its version, and an import that stays light."""

import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from importlib.metadata import version

import pytest
from places import ROOT

import modeling_deepseek_moe

FOLDERS = {
    "modeling_deepseek_moe": "modeling_deepseek_moe",
    "conversion": "modeling_deepseek_moe/conversion",
    "finetune": "modeling_deepseek_moe/finetune",
    "model_cards": "modeling_deepseek_moe/model_cards",
}
FOLDERS_WITH_DATA = ("finetune", "model_cards")
CHECKOUT_ONLY = ROOT / "model_cards/demo_base/scripts"  # made the demo's base


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel, built the way a release is: from the sdist, out of a copy that only has the package's files."""
    source, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(dist), str(source)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as archive:
        yield archive


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_module_and_data_file_of_a_top_level_folder_is_in_the_wheel(wheel, folder):
    expected = {
        f"{FOLDERS[folder]}/{path.relative_to(ROOT / folder).as_posix()}"
        for path in (ROOT / folder).rglob("*" if folder in FOLDERS_WITH_DATA else "*.py")
        if path.is_file() and "__pycache__" not in path.parts and not path.is_relative_to(CHECKOUT_ONLY)
    }
    assert expected, f"{folder}/ is empty"
    assert expected <= set(wheel.namelist())


def test_scripts_that_made_the_demos_base_stay_in_the_checkout(wheel):
    assert list(CHECKOUT_ONLY.glob("*.py")) and list(CHECKOUT_ONLY.glob("*.yaml"))
    assert [name for name in wheel.namelist() if "/scripts/" in name] == []


def test_the_wheel_has_one_import_root_and_the_license(wheel):
    roots = {name.split("/")[0] for name in wheel.namelist()}
    info = next(root for root in roots if root.endswith(".dist-info"))
    assert roots == {"modeling_deepseek_moe", info}
    assert f"{info}/licenses/LICENSE" in wheel.namelist()


def test_the_wheel_installs_the_command(wheel):
    entry_points = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "deepseek-moe = modeling_deepseek_moe.cli.main:main" in wheel.read(entry_points).decode()


def test_wheel_installation_module_and_changelog_state_the_same_version(wheel):
    metadata = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    built = Parser().parsestr(wheel.read(metadata).decode())["Version"]
    newest_entry = re.search(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert built == version("deepseek-moe") == modeling_deepseek_moe.__version__ == newest_entry.group(1)


def test_importing_the_package_does_not_import_what_only_commands_need(tmp_path):
    """A server that only runs the model should not pay for, or need, the training libraries."""
    code = (
        "import sys, modeling_deepseek_moe\n"
        "print(*sorted({'matplotlib', 'typer', 'datasets', 'reasoning_gym'} & set(sys.modules)))"
    )
    imported = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert imported.stdout.strip() == ""


def test_the_readmes_tree_names_what_is_there_and_leaves_out_no_module():
    tree = (ROOT / "README.md").read_text(encoding="utf-8").split("## The tree")[1].split("```")[1]
    named, folders = set(), []
    for line in tree.strip().splitlines():
        depth = (len(line) - len(line.lstrip())) // 4
        paths = ["".join(folders[:depth]) + name for name in re.split(r"\s{3,}", line.strip())[0].split()]
        named.update(paths)
        folders[depth:] = [paths[0].removeprefix("".join(folders[:depth]))]
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
    modules = {path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    assert sorted(path for path in modules - named if not path.endswith("/__init__.py")) == []
