"""The documentation: what it includes is there, what is broken in it is an error, and it is read without a network."""

import importlib.util
import shutil
import subprocess
import sys

import pytest
import yaml
from mkdocs.exceptions import PluginError
from places import ROOT

GENERATE = ROOT / "docs/generate"


def module_of_the_docs(name: str):
    """Loaded by its path: modules of tests have names like theirs."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", GENERATE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


repository, offline = module_of_the_docs("repository"), module_of_the_docs("offline")


def test_a_section_of_a_file_ends_at_the_next_heading_and_code_has_none(tmp_path, monkeypatch):
    (tmp_path / "a.md").write_text("# A\n\ntop\n\n## One\n\n```\n# no heading\n```\n### Deeper\nlast\n\n## Two\n\nx\n")
    monkeypatch.setattr(repository, "ROOT", tmp_path)
    assert repository.section("a.md", "One") == "```\n# no heading\n```\n### Deeper\nlast\n"
    assert repository.section("a.md", "") == "top\n"
    with pytest.raises(PluginError, match="a.md has no section 'Three'.* it has A, One, Deeper, Two"):
        repository.section("a.md", "Three")
    with pytest.raises(PluginError, match="b.md, which a page includes, is not in the repository"):
        repository.section("b.md", "One")


def test_links_of_a_file_lead_to_its_pages_and_pictures_come_along(monkeypatch):
    text = (
        "[c](conversion/README.md#adapters) ![d](tests/benchmarks/results/decode.png) [t](tests/conftest.py) [a](#b)"
    )
    monkeypatch.setattr(repository, "repository_address", lambda: None)
    found, images = repository.with_links(text, "README.md", "speed/index.md")
    assert found.split() == [
        "[c](../conversion.md#adapters)",
        "![d](../images/tests/benchmarks/results/decode.png)",
        "t",
        "[a](#b)",
    ]
    assert images == {"tests/benchmarks/results/decode.png"}
    monkeypatch.setattr(repository, "repository_address", lambda: "https://example.org/r")
    assert (
        "[t](https://example.org/r/blob/main/tests/conftest.py)" in repository.with_links(text, "README.md", "a.md")[0]
    )


def test_a_link_of_a_file_to_what_is_not_there_is_an_error():
    with pytest.raises(PluginError, match=r"README.md links to gone.md, which is not in the repository"):
        repository.with_links("[x](gone.md)", "README.md", "index.md")


@pytest.mark.parametrize(
    ("html", "fetched"),
    [
        ('<script src="https://cdn.example/a.js">', ["https://cdn.example/a.js"]),
        ("<img src=//cdn.example/a.png>", ["//cdn.example/a.png"]),
        ('<img srcset="a.png 1x, https://cdn.example/b.png 2x">', ["https://cdn.example/b.png"]),
        ('<link href="https://fonts.example/css" rel="stylesheet">', ["https://fonts.example/css"]),
        ('<link rel="preconnect" href="https://fonts.example">', ["https://fonts.example"]),
        ('<link rel=canonical href="https://example.org"><a href="https://example.org">', []),
        ('<img src="data:image/png;base64,AA=="><script src="../assets/a.js">', []),
    ],
)
def test_what_a_browser_would_fetch_from_elsewhere_is_found(html, fetched):
    assert offline.fetched_by(html) == fetched


@pytest.mark.slow
@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("[x](no-such-page.md)", "contains a link 'no-such-page.md'"),
        ("[x](conversion.md#no-such-place)", "does not contain an anchor '#no-such-place'"),
        ("{{ README.md#No such section }}", "README.md has no section 'No such section'"),
        ("![x](https://cdn.example/x.png)", "quickstart.md would fetch https://cdn.example/x.png"),
        ("::: modeling_deepseek_moe.no_such_module", "modeling_deepseek_moe.no_such_module could not be found"),
        ("", None),
    ],
    ids=["page", "anchor", "section", "fetched", "module", "sound"],
)
def test_what_is_broken_in_a_page_ends_the_build(tmp_path, broken, said):
    shutil.copytree(ROOT / "docs/pages", tmp_path / "pages")
    with (tmp_path / "pages/quickstart.md").open("a", encoding="utf-8") as page:
        page.write(f"\n{broken}\n")
    text = (ROOT / "docs/mkdocs.yml").read_text(encoding="utf-8").replace("generate/", f"{GENERATE}/")
    config = {**yaml.safe_load(text), "docs_dir": str(tmp_path / "pages"), "site_dir": str(tmp_path / "site")}
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    command = [sys.executable, "-m", "mkdocs", "build", "--config-file", str(tmp_path / "mkdocs.yml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if said is None:
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "site/fine-tuning/recipes/lora_all.html").is_file()
    else:
        assert done.returncode != 0
        assert said in done.stderr
