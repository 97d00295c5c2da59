"""`deepseek-moe push`: what a run left, with its card, into a repository of the Hub."""

import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from rich.console import Console
from rich.table import Table

from modeling_deepseek_moe.model_cards.card import PICTURES, check, licence_of, on_the_hub, run_card
from modeling_deepseek_moe.model_cards.ways_to_load import ways_to_load

from ..errors import UserError
from ..files import write_text
from ..recipe.schema import Recipe
from ..recipe.values import read_yaml
from ..runs.results import RunResults, read_results, run_identity
from .parts import check_link
from .staging import CARD, choose_kind, fetch_base, read_base_config, stage
from .upload import RECORD, Contents, check_repo, make_repo, push, read_file

# PEFT writes a card of which nothing is filled in.
_EMPTY_CARD = "[More Information Needed]"


def push_run(
    run: str | os.PathLike[str],
    to: str,
    *,
    adapter_only: bool = False,
    merged: bool = False,
    native: str | None = None,
    with_code: bool = False,
    private: bool | None = None,
    base: str | None = None,
    license: str | None = None,
    force: bool = False,
    endpoint: str | None = None,
    token: str | bool | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> str:
    """Publish what a run left; the same call goes on where a stopped one was.

    Args:
        run: folder of a run, of an adapter or of a model.
        to: `user/name`.
        adapter_only, merged, native, with_code: what is pushed, at most one of these: the adapter; the whole model,
            into which the adapter is merged if only that was saved; that model as one of DeepSeek's model types; or
            with its code, for `trust_remote_code=True`. By default what the run saved, the model if it saved both.
        private: who can see the repository, only you or everybody; a new one is private by default.
        base: the base's name on the Hub, where the run knows a folder.
        license: licence id for the card; by default what the base's card says.
        force: replace what the repository holds, whatever it is.
        endpoint, token: address of the Hub and token for it; by default what `hf auth login` left.
        sleep: waits so many seconds between two tries.

    Returns:
        The repository's address.

    Raises:
        UserError: one line; nothing was uploaded, or the upload did not come to its end.
    """
    access: dict[str, Any] = {"endpoint": endpoint, "token": token}
    results = read_results(Path(run))
    kind = choose_kind(results, adapter_only, merged, native, with_code)
    base = base or (results.base if on_the_hub(results.base) else None)
    contents = Contents(results.identity(), kind)
    work = results.folder.with_name(f"{results.folder.name}.push.aside")
    check_repo(to, private, contents=contents, force=force, **access)  # before hours of merging
    licence = {"license": license} if license else _licence(results, base, access)
    check(ModelCardData(base_model=base, **licence))
    base_json = read_base_config(results, base, **access)
    try:
        upload = _staged(results, kind, work, to, base, licence, base_json, access)
        write_text(upload / RECORD, contents.text())
        make_repo(to, private is not False, contents=contents, **access)
        console = Console()
        console.print(_listing(upload, to))
        address = push(upload, to, replace=_outdated(force), sleep=sleep, **access)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped: the same command goes on with what is in {work}") from None
    ways = ways_to_load(upload, kind, to, base, base_json)
    way, elsewhere = ways[0], [other for other in ways if "--to peft-native" in other.note]
    shutil.rmtree(work)
    console.print(f"\n{address}\n\n{way.title}:\n\n{way.code}", markup=False, highlight=False, soft_wrap=True)
    for other in elsewhere:
        console.print(f"\n{other.title}: {other.note}", markup=False, highlight=False, soft_wrap=True)
    if kind == "adapter" and not base and results.base:
        console.print(f"\nOthers do not have {results.base}, which the adapter is for: push it too, then give --base")
    return address


def _staged(
    results: RunResults,
    kind: str,
    work: Path,
    repo_id: str,
    base: str | None,
    licence: dict[str, str],
    base_json: dict[str, Any] | None,
    access: dict[str, Any],
) -> Path:
    """Weights, pictures and card; after an error nothing of them is left."""
    try:
        upload = stage(results, kind, work, base, lambda name: fetch_base(name, **access))
        for picture in PICTURES:
            if (results.folder / picture).is_file():
                check_link(results.folder / picture)
                shutil.copyfile(results.folder / picture, upload / picture)
        card = _own_card(results) or run_card(results, kind, upload, repo_id, base, licence, base_json)
    except UserError:
        shutil.rmtree(work, ignore_errors=True)
        raise
    write_text(upload / CARD, f"{str(card).rstrip()}\n")
    return upload


def open_repo(recipe: Recipe, folder: Path) -> None:
    """Make the repository that a run is to be pushed to, before hours of training.

    Raises:
        UserError: it cannot be written to, holds another model, or others see it though the recipe says private.
    """
    whole = recipe.merge or not (recipe.lora or recipe.esft)
    contents = Contents(run_identity(folder), "model" if whole else "adapter")
    check_repo(recipe.hub_id, recipe.hub_private, contents=contents)
    make_repo(recipe.hub_id, recipe.hub_private, contents=contents)


def _own_card(results: RunResults) -> ModelCard | None:
    """The card that somebody wrote for these results, if there is one."""
    path = results.folder / CARD
    check_link(path)
    if not path.is_file():
        return None
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text, so it is no card: mend it, or take it away") from error
    if _EMPTY_CARD in text:
        return None
    if header := re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL):
        read_yaml(header[1], str(path))  # says what the card's own reader would fall over
    card = ModelCard.load(path)
    check(card.data)
    return card


def _licence(results: RunResults, base: str | None, access: dict[str, Any]) -> dict[str, str]:
    """What the base's card says: the one in its folder, or the Hub's."""
    if results.base and Path(results.base).is_dir():
        card = Path(results.base) / CARD
        return licence_of(card.read_text("utf-8")) if card.is_file() else {}
    return licence_of(read_file(base, CARD, **access)) if base else {}


def _outdated(force: bool) -> tuple[str, ...]:
    """Patterns of what goes: with `force` everything; else earlier weights, which may have been in more files."""
    return ("*",) if force else ("*.safetensors", "*.safetensors.index.json")


def _listing(folder: Path, repo_id: str) -> Table:
    table = Table(title=f"To {repo_id}", show_footer=True)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = [path.stat().st_size for path in files]
    table.add_column("file", "together")
    table.add_column("size", _size(sum(sizes)), justify="right")
    for path, size in zip(files, sizes, strict=True):
        table.add_row(str(path.relative_to(folder)), _size(size))
    return table


def _size(count: int) -> str:
    for unit, divisor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= divisor:
            return f"{count / divisor:.1f} {unit}"
    return f"{count} B"
