"""What pip installs: the wheel's contents, its version, and an import that stays light."""

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from importlib.metadata import version
from pathlib import Path

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


def test_the_wheel_says_that_its_annotations_may_be_read(wheel):
    assert "modeling_deepseek_moe/py.typed" in wheel.namelist()  # PEP 561


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


def paths_in_the_readmes_tree() -> set[str]:
    tree = (ROOT / "README.md").read_text(encoding="utf-8").split("## The tree")[1].split("```")[1]
    named, folders = set(), []
    for line in tree.strip().splitlines():
        depth = (len(line) - len(line.lstrip())) // 4
        paths = ["".join(folders[:depth]) + name for name in re.split(r"\s{3,}", line.strip())[0].split()]
        named.update(paths)
        folders[depth:] = [paths[0].removeprefix("".join(folders[:depth]))]
    return named


def modules_of_the_folders() -> list[Path]:
    return sorted(path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def test_the_readmes_tree_names_what_is_there_and_leaves_out_no_wing():
    named = paths_in_the_readmes_tree()
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
    wings = {f"{path.parent.as_posix()}/" for path in modules_of_the_folders() if path.name == "__init__.py"}
    assert sorted(wings - named) == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 250


def what_the_wing_says(folder: Path) -> str:
    """The README and the docstring of the folder, or of the nearest above it that has one."""
    docs = [
        (folder / "README.md").read_text(encoding="utf-8") if (folder / "README.md").is_file() else "",
        ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
        if (folder / "__init__.py").is_file()
        else "",
    ]
    return "\n".join(docs) if any(docs) else what_the_wing_says(folder.parent)


@pytest.mark.parametrize("wing", sorted({path.parent for path in modules_of_the_folders()}), ids=str)
def test_every_wing_says_its_files(wing):
    text = what_the_wing_says(ROOT / wing)
    modules = {path.name for path in (ROOT / wing).glob("*.py")} - {"__init__.py"}
    assert sorted(name for name in modules if not re.search(rf"(?<![\w]){re.escape(name)}", text)) == []
    listed = re.findall(r"^ *(\S+(?:\.py|/))  ", text, re.M)
    assert [name for name in listed if not (ROOT / wing / name).exists()] == []


def test_files_with_links_of_the_readmes_are_there():
    for readme in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / folder / "README.md" for folder in FOLDERS)):
        if readme.is_file():
            links = re.findall(r"\]\((?!https?:)([^)#]+)", readme.read_text(encoding="utf-8"))
            assert [link for link in links if not (readme.parent / link).exists()] == [], readme
