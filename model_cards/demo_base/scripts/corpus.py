"""What the demo's base model reads: procedural tasks of `reasoning-gym` and the source of Python's own library.

Nothing is downloaded and nothing is stored: every document is generated from a seed when it is needed. The demo's own
task (`DEMO_TASK` in `finetune/demo/task.py`) is never part of this corpus.
"""

import ast
import functools
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import reasoning_gym

from modeling_deepseek_moe.finetune.demo.task import as_prompt

# Questions are short (see `short_question`) and so are answers: a document is rarely longer than 150 tokens.
PRETRAINING_TASKS: dict[str, dict[str, Any]] = {
    "caesar_cipher": {"min_words": 1, "max_words": 2, "max_rotation": 2},
    "chain_sum": {"min_terms": 2, "max_terms": 2, "max_digits": 2},
    "count_bits": {"max_n": 255},
    "letter_counting": {"min_words": 2, "max_words": 5},
    "letter_jumble": {"min_words": 1, "max_words": 2, "max_corruption_level": 0.3},
    "needle_haystack": {"min_num_statements": 2, "max_num_statements": 2},
    "number_filtering": {"max_numbers": 5, "max_decimals": 0},
    "number_sequence": {},
    "palindrome_generation": {"max_length": 8},
    "rotate_matrix": {"min_n": 2, "max_n": 3, "max_rotations": 2},
    "sentence_reordering": {"min_words_in_sentence": 3, "max_words_in_sentence": 6},
    "spiral_matrix": {"min_n": 2, "max_n": 3},
    "string_insertion": {"max_string_length": 12},
    "word_sequence_reversal": {"min_words": 3, "max_words": 5},
}

LIBRARY_PACKAGES = (
    "asyncio",
    "collections",
    "concurrent",
    "email",
    "http",
    "importlib",
    "json",
    "logging",
    "unittest",
)
HELD_OUT_MODULES = frozenset({"bisect", "calendar", "fractions", "queue", "textwrap", "zipfile"})
LONGEST_SNIPPET = 1200


class Document(NamedTuple):
    """One training text. A task has a `prompt` and a `completion`; library text has an empty prompt."""

    prompt: str
    completion: str
    source: str

    @property
    def text(self) -> str:
        """The document as the model reads it, without `bos` and `eos`."""
        return self.prompt + self.completion


def short_question(question: str) -> str:
    """Drop the boilerplate that many tasks put in front of the question: keep the last paragraph."""
    return question.strip().split("\n\n")[-1].strip()


@functools.cache
def _task(name: str, seed: int) -> Any:
    return reasoning_gym.create_dataset(name, size=10**9, seed=seed, **PRETRAINING_TASKS[name])


def task_document(name: str, index: int, seed: int = 0) -> Document:
    """Item `index` of one pretraining task; the same arguments give the same document."""
    item = _task(name, seed)[index]
    return Document(as_prompt(short_question(item["question"])), item["answer"], name)


@functools.cache
def library_snippets(held_out: bool = False) -> tuple[str, ...]:
    """Functions, classes' heads and docstrings of the running Python's library, in a fixed order.

    Args:
        held_out: the modules of `HELD_OUT_MODULES` (validation) instead of all the others (training).
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(root.glob("*.py")) + [
        file for name in LIBRARY_PACKAGES for file in sorted((root / name).glob("*.py"))
    ]
    chosen = [file for file in files if (file.stem in HELD_OUT_MODULES) == held_out]
    return tuple(snippet for file in chosen for snippet in _snippets_of(file))


def _snippets_of(file: Path) -> Iterator[str]:
    source = file.read_text(encoding="utf-8")
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield "\n".join(lines[node.lineno - 1 : node.end_lineno])[:LONGEST_SNIPPET]
        elif isinstance(node, ast.ClassDef | ast.Module) and (text := ast.get_docstring(node)):
            yield text[:LONGEST_SNIPPET]


def documents(seed: int, task_share: float = 0.97, held_out: bool = False) -> Iterator[Document]:
    """An endless stream of documents, a function of `seed` alone.

    Args:
        seed: the training stream of step `n` uses seed `n`.
        task_share: the share of documents that are tasks; the rest is library text.
        held_out: library text comes from `HELD_OUT_MODULES`, tasks from indices that training never reaches.
    """
    rng = random.Random(f"{seed}-{held_out}")
    names = list(PRETRAINING_TASKS)
    snippets = library_snippets(held_out)
    while True:
        if rng.random() < task_share:
            index = rng.randrange(2**40) * 2 + held_out
            yield task_document(rng.choice(names), index)
        else:
            yield Document("", rng.choice(snippets), "library")
