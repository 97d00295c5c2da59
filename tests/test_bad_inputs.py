"""Whatever a verb is given that it cannot use is refused by one line: no silence, no traceback, no hang.

`pytest -s tests/test_bad_inputs.py` prints the table of what was tried. The inputs are data, in `tests/support/bad/`.
"""

import collections
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import transformers
from bad import adapters, calls, models, recipes, requests, rows
from bad.trying import OUTCOMES, Case, Tried, try_case
from convert_folders import fp8_folder
from rich.console import Console
from rich.table import Table
from tiny_run import counting_rows, tiny_base, tiny_tokenizer, write_jsonl

from modeling_deepseek_moe.finetune.data import templates

KINDS: dict[str, Callable[[], Iterator[Case]]] = {
    "numbers of a recipe": recipes.number_cases,
    "other values of a recipe": recipes.value_cases,
    "files that are no recipe": recipes.file_cases,
    "calls": calls.call_cases,
    "files of scores": calls.score_cases,
    "config.json": models.config_cases,
    "weights": models.file_cases,
    "tokenizers": models.tokenizer_cases,
    "chat templates": models.template_cases,
    "adapters": adapters.adapter_cases,
    "runs": adapters.run_cases,
    "rows": rows.row_cases,
}
LEAST = 200


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    """Sound files, by the names that the cases have for them."""
    root = tmp_path_factory.mktemp("sound")
    base = tiny_base(root / "base")
    tiny_tokenizer().save_pretrained(fp8 := fp8_folder(root / "fp8"))
    return {
        "base": base,
        "fp8": fp8,
        "rows": write_jsonl(root / "rows.jsonl", counting_rows("prompt")),
        "chats": write_jsonl(root / "chats.jsonl", counting_rows("messages")),
        "adapter": adapters.save_adapter(base, root / "adapter"),
        **calls.more_places(root),
    }


@pytest.fixture(scope="module")
def counts() -> Iterator[dict[str, collections.Counter]]:
    """How many of each kind ended how; printed at the end."""
    found: dict[str, collections.Counter] = {}
    yield found
    table = Table("kind of damage or input", "tried", *OUTCOMES)
    for kind, outcomes in {**found, "together": sum(found.values(), collections.Counter())}.items():
        table.add_row(kind, str(outcomes.total()), *(str(outcomes[outcome]) for outcome in OUTCOMES))
    Console().print(table)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """No waiting for a network that is not there, nor for templates as long as they may take."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(templates, "_SECONDS", 1)
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)


def check(kind: str, tried: list[Tried], counts: dict[str, collections.Counter]) -> None:
    counts[kind] = collections.Counter(each.outcome for each in tried)
    wrong = [f"{each.case.name}: {each.outcome}: {each.line}" for each in tried if each.outcome != "clear"]
    assert tried and not wrong, "\n".join(wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_refused_by_one_line(kind, places, counts, tmp_path):
    tried = []
    for number, case in enumerate(KINDS[kind]()):
        (tmp_path / str(number)).mkdir()
        tried.append(try_case(case, tmp_path / str(number), places))
    check(kind, tried, counts)


def test_the_local_hub_answers_what_is_wrong_and_goes_on(tmp_path, api, hub, counts, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    (tmp_path / "notes.txt").write_text("nested")
    api.create_repo("me/model")
    api.upload_file(path_or_fileobj=tmp_path / "notes.txt", path_in_repo="sub/notes.txt", repo_id="me/model")
    check("requests to the local Hub", list(requests.try_requests(hub.endpoint)), counts)
    assert api.list_repo_files("me/model") == ["sub/notes.txt"]


@pytest.mark.slow
def test_a_template_without_end_is_refused_in_the_time_that_users_wait(places, tmp_path, monkeypatch):
    monkeypatch.undo()
    case = next(case for case in models.template_cases() if case.name == "chat: an endless template")
    assert try_case(case, tmp_path, places).outcome == "clear"


def test_so_many_inputs_are_tried():
    assert sum(len(list(cases())) for cases in KINDS.values()) + len(requests.REQUESTS) >= LEAST
