"""Who may import whom: read from the source, without importing the package.

    python tests/support/import_rules.py      prints the table of wings that is in CONTRIBUTING.md

A wing is a folder of modules; a file beside the wings of `conversion/` or `finetune/` is one of its own. The files
that an export to the Hub takes along are one wing, `model`; the others in their folder make the package's `face`, but
for `_compat`, which needs nothing of the package and is needed below the face.
"""

import ast
import sys
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from places import ROOT

PACKAGE = "modeling_deepseek_moe"
FOLDERS = {
    "modeling_deepseek_moe": PACKAGE,
    "conversion": f"{PACKAGE}.conversion",
    "finetune": f"{PACKAGE}.finetune",
    "model_cards": f"{PACKAGE}.model_cards",
}
EXPORTED = f"{PACKAGE}.modeling_deepseek_moe"
# From the ground up: a wing imports only wings of lower levels.
LEVELS = (
    ("model", "_compat"),
    ("quantized",),
    ("kernels/sorted",),
    ("kernels/triton",),
    ("kernels",),
    ("face",),
    ("conversion/engine",),
    ("conversion/adapters", "conversion/upcycle"),
    ("conversion/formats",),
    ("conversion/request", "conversion/verify"),
    ("conversion/upcycle_report",),
    ("conversion/one_conversion",),
    ("conversion/command", "conversion"),
    ("finetune/_compat", "finetune/errors", "finetune/files", "finetune/progress"),
    ("finetune/recipe",),
    ("finetune/data", "finetune/model", "finetune/runs"),
    ("finetune/evaluate", "finetune/experts", "finetune/plan", "model_cards"),
    ("finetune/hub",),
    ("finetune/train",),
    ("finetune/demo",),
    ("finetune",),
    ("cli",),
)
LEVEL_OF = {wing: level for level, wings in enumerate(LEVELS) for wing in wings}
MAY_IMPORT_CARDS = {"finetune/hub", "finetune/demo", "model_cards"}
CARDS_MAY_IMPORT = {"finetune/errors", "finetune/recipe", "finetune/runs"}
CARDS_MAY_IMPORT_MODULES = {f"{PACKAGE}.finetune.model.lora"}


class Import(NamedTuple):
    """One import statement of the package's own modules: where it stands, and what it names."""

    importer: str
    imported: str
    line: int
    is_typing: bool = False


class House:
    """The modules of the checkout and their imports of each other.

    Args:
        root: of the checkout.

    Attributes:
        files: path of every module by its dotted name.
        imports: every import of one of them by another, wherever it stands in the file.
    """

    def __init__(self, root: Path = ROOT):
        self.root = root
        self.files = {
            _dotted(FOLDERS[folder], path.relative_to(root / folder)): path
            for folder in FOLDERS
            for path in sorted((root / folder).rglob("*.py"))
            if not path.is_relative_to(root / "finetune" / "metrics") and "demo_base" not in path.parts
        }
        self.imports = [found for name in self.files for found in self._imports_of(name)]

    @cached_property
    def exported(self) -> set[str]:
        """The modules that an export to the Hub takes along: the model's, and those beside it that it needs."""
        found, waiting = set(), [EXPORTED]
        while waiting:
            name = waiting.pop()
            found.add(name)
            needed = {each.imported for each in self.imports if each.importer == name} - found
            waiting += [other for other in needed if self.files[other].parent == self.files[EXPORTED].parent]
        return found

    def wing(self, module: str) -> str:
        """The wing that a module is in."""
        parts = module.split(".")[1:]
        is_package = self.files[module].name == "__init__.py"
        folders = parts if is_package else parts[:-1]
        if folders[:1] == ["model_cards"]:
            return "model_cards"
        if folders in (["conversion"], ["finetune"]):
            return "/".join(parts)
        if folders:
            return "/".join(folders[:2])
        if parts == ["_compat"]:
            return "_compat"
        return "model" if module in self.exported else "face"

    def violations(self) -> list[str]:
        """Every import that breaks a rule, as `file:line` and the rule; none in a sound house."""
        return [f"{self._where(each)} {rule}" for each in self.imports for rule in self._broken_rules(each)]

    def circle(self) -> list[str]:
        """Modules that import each other in a circle, in its order; empty if there is none."""
        imported = {name: sorted(self._at_runtime(name)) for name in self.files}
        done: set[str] = set()

        def visit(name: str, path: list[str]) -> list[str]:
            if name in path:
                return path[path.index(name) :] + [name]
            if name in done:
                return []
            for other in imported[name]:
                if found := visit(other, [*path, name]):
                    return found
            done.add(name)
            return []

        return next((found for name in imported if (found := visit(name, []))), [])

    def table(self) -> str:
        """The wings in Markdown from the roof down, each with the wings that it imports."""
        imported: dict[str, set[str]] = {wing: set() for wing in LEVEL_OF}
        for each in self.imports:
            imported[self.wing(each.importer)].add(self.wing(each.imported))
        lines = ["| level | wing | imports |", "|---|---|---|"]
        for level, wings in reversed(list(enumerate(LEVELS))):
            for wing in wings:
                others = sorted(imported[wing] - {wing}, key=lambda other: (-LEVEL_OF[other], other))
                lines.append(f"| {level} | `{wing}` | {', '.join(others)} |")
        return "\n".join(lines)

    def _imports_of(self, name: str) -> Iterator[Import]:
        path = self.files[name]
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        tree = ast.parse(path.read_text(encoding="utf-8"))
        typing = {
            inner
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            named: list[str] = []
            if isinstance(node, ast.Import):
                named = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                origin = ".".join([*base, *([node.module] if node.module else [])])
                # What is imported from a package may be a module of it.
                named = [each if (each := f"{origin}.{alias.name}") in self.files else origin for alias in node.names]
            for imported in dict.fromkeys(named):
                if imported in self.files and imported != name:
                    yield Import(name, imported, node.lineno, node in typing)

    def _broken_rules(self, each: Import) -> Iterator[str]:
        ours, theirs = self.wing(each.importer), self.wing(each.imported)
        if theirs == "cli" and ours != "cli":
            yield "imports the command line, which nothing may"
        if each.importer in self.exported and each.imported not in self.exported:
            yield f"is exported to the Hub, and imports {each.imported}, which is not"
        if ours.startswith("conversion") and theirs.startswith("finetune"):
            yield "is of conversion, which never imports finetune"
        if theirs == "model_cards" and ours not in MAY_IMPORT_CARDS:
            yield f"imports model_cards, which only {', '.join(sorted(MAY_IMPORT_CARDS - {theirs}))} may"
        known_to_cards = theirs in CARDS_MAY_IMPORT or each.imported in CARDS_MAY_IMPORT_MODULES
        if ours == "model_cards" and theirs.startswith("finetune/") and not known_to_cards:
            yield f"is of model_cards, which may not import {each.imported}"
        if ours != theirs and LEVEL_OF[theirs] >= LEVEL_OF[ours]:
            where = "beside" if LEVEL_OF[theirs] == LEVEL_OF[ours] else "above"
            yield f"is of {ours}, and imports {theirs}, {where} it"

    def _at_runtime(self, name: str) -> set[str]:
        return {each.imported for each in self.imports if each.importer == name and not each.is_typing}

    def _where(self, each: Import) -> str:
        return f"{self.files[each.importer].relative_to(self.root)}:{each.line}"


def _dotted(package: str, path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join([package, *(parts[:-1] if parts[-1] == "__init__" else parts)])


if __name__ == "__main__":
    house = House()
    print(house.table())
    sys.exit("\n".join(house.violations()) or None)
