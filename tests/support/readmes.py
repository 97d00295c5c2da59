"""What the READMEs tell a reader to type: their blocks, and the commands in their text and tables."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import typer

from modeling_deepseek_moe.cli.main import app
from modeling_deepseek_moe.finetune.errors import UserError
from modeling_deepseek_moe.finetune.recipe.load import load_recipe

ROOT = Path(__file__).parents[2]
READMES = ("README.md", "finetune/README.md", "conversion/README.md")
COMMAND = "deepseek-moe"
_INLINE = re.compile(r"`([^`\n]+)`")
# Beginnings of commands, as against names of files and values in the text.
_TYPED = ("deepseek-moe ", "make ", "python ", "pip ", "git ")


@dataclass(frozen=True)
class Typed:
    """Something to type.

    Attributes:
        where: file and line.
        language: bash or python.
        text: one command, or a whole block of Python.
        kind: block, table, or prose, where a command may be half of one.
    """

    where: str
    language: str
    text: str
    kind: str


def typed_in(readme: str) -> list[Typed]:
    """Everything to type in a README, from top to bottom."""
    found, block, language = [], [], None
    for number, line in enumerate((ROOT / readme).read_text("utf-8").splitlines(), start=1):
        where = f"{readme}:{number}"
        if line.startswith("```"):
            if language == "python":
                found.append(Typed(where, "python", "\n".join(block), "block"))
            language, block = (line[3:].strip() or "text", []) if language is None else (None, [])
        elif language is None:
            kind = "table" if line.startswith("|") else "prose"
            commands = [code for code in _INLINE.findall(line) if code.startswith(_TYPED)]
            found += [Typed(where, "bash", command, kind) for command in commands]
        else:
            block.append(line)
            if language == "bash" and line.strip():
                found.append(Typed(where, "bash", line.partition(" #")[0].rstrip(), "block"))
    return found


def command_problem(command: str, may_lack: bool = False) -> str | None:
    """Why `deepseek-moe` would not begin to do what a command line says; None if it would.

    Verbs, options and arguments go through the command's own parser, recipes and keys through the recipes' checks.

    Args:
        command: the line, which begins with `deepseek-moe`.
        may_lack: arguments may be left out, as in a sentence about a verb.
    """
    program, *words = shlex.split(command)
    assert program == COMMAND, command
    words = words[: words.index(">")] if ">" in words else words
    verb, context = typer.main.get_command(app), None
    if words[:1] and any(words[0] in option.opts for option in verb.params):  # parsing it would obey it
        return None
    try:
        while True:
            context = verb.make_context(verb.name or program, list(words), parent=context)
            if not hasattr(verb, "resolve_command"):
                break
            _, verb, words = verb.resolve_command(context, [*context._protected_args, *context.args])
        given = context.params
        if verb.name == "finetune":
            load_recipe(given["recipe"], given["overrides"])
        if verb.name == "plan" and given["recipe"]:
            load_recipe(given["recipe"], ["data=d", "output_dir=o", *(given["overrides"] or [])])
    except UserError as error:
        return None if may_lack and "lacks" in str(error) else str(error)
    except Exception as error:
        if not hasattr(error, "format_message"):  # how the parser's own errors are known, wherever their class lives
            raise
        missing = type(error).__name__ in ("MissingParameter", "NoArgsIsHelpError")
        return None if may_lack and missing else error.format_message()
    return None
