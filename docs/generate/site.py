"""The hook of MkDocs: pages out of the repository's files and code, and a look at what the built ones would fetch.

A page includes a section of another file by a line of its own, `{{ README.md#Speed }}`; `{{ README.md# }}` is what
stands above the first section.
"""

import re
import tempfile
from pathlib import Path

import family_pages
import notebook_pages
import recipe_pages
import reference_pages
from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File
from offline import fetched_by
from repository import CARDS, ROOT, WHOLE, read, section, with_links

_INCLUDE = re.compile(r"^\{\{ ([\w./-]+)#([^}]*) \}\}$", re.M)
# The folders that pip installs as subpackages of the first.
_PACKAGE, _SUBPACKAGES = "modeling_deepseek_moe", ("conversion", "finetune", "model_cards")
_sources = tempfile.TemporaryDirectory()


@event_priority(100)  # before mkdocstrings reads its options
def on_config(config):
    """Lays the package out as pip installs it, for mkdocstrings to read, and names recipes and cards in `nav`."""
    package = Path(_sources.name) / _PACKAGE
    if not package.exists():
        package.mkdir()
        for path in [*(ROOT / _PACKAGE).iterdir(), *(ROOT / name for name in _SUBPACKAGES)]:
            (package / path.name).symlink_to(path)
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [_sources.name]
    cards = ["models/cards/demo-base.md", *CARDS.values()]
    config.nav = _filled(config.nav, {"RECIPES": list(recipe_pages.pages()), "CARDS": cards})
    return config


def _filled(nav, lists):
    """`nav` with the pages of a list in the place of its name."""
    if isinstance(nav, list):
        filled = [lists.get(entry, [entry]) if isinstance(entry, str) else [_filled(entry, lists)] for entry in nav]
        return sum(filled, [])
    return {title: _filled(inner, lists) for title, inner in nav.items()} if isinstance(nav, dict) else nav


def on_files(files, config):
    """Adds the pages that stand elsewhere or are generated, and every picture that they show."""
    texts, pictures = notebook_pages.pages()
    texts |= reference_pages.pages() | recipe_pages.pages() | family_pages.pages()
    shown = set()
    for file, page in WHOLE.items():
        texts[page], images = with_links(read(file), file, page)
        shown |= images
    for page in files.documentation_pages():
        for file, title in _INCLUDE.findall(Path(page.abs_src_path).read_text(encoding="utf-8")):
            shown |= with_links(section(file, title.strip()), file, page.src_uri)[1]
    for page, text in texts.items():
        files.append(File.generated(config, page, content=text))
    for name, data in pictures.items():
        files.append(File.generated(config, name, content=data))
    for image in sorted(shown):
        files.append(File.generated(config, f"images/{image}", abs_src_path=str(ROOT / image)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Puts included sections in."""

    def included(match: re.Match) -> str:
        return with_links(section(match[1], match[2].strip()), match[1], page.file.src_uri)[0]

    return _INCLUDE.sub(included, markdown)


def on_post_page(output, page, config):
    """Refuses a page that a browser could not show without a network."""
    if fetched := fetched_by(output):
        raise PluginError(f"{page.file.src_uri} would fetch {fetched[0]} when it is read")
    return output
