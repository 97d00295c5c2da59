"""What recipes and keys there are: `recipes`, `keys`, and what help and the shell's completion say of them."""

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperCommand

from modeling_deepseek_moe.errors import UserError


def _complete_recipe(incomplete: str) -> list[tuple[str, str]]:
    from modeling_deepseek_moe.finetune.recipe.load import SHIPPED

    return [(name, _summary(name)) for name in SHIPPED if name.startswith(incomplete)]


def _complete_key(incomplete: str) -> list[tuple[str, str]]:
    from modeling_deepseek_moe.finetune.recipe.keys import recipe_keys

    return [(f"{key.name}=", key.line) for key in recipe_keys() if key.name.startswith(incomplete)]


RecipeName = typer.Argument(
    help="A YAML file, the name of a shipped recipe such as lora_all, or the folder of a run.",
    autocompletion=_complete_recipe,
)
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Recipe keys that win over the file: output_dir=runs/a",
        autocompletion=_complete_key,
    ),
]


def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this one, to look at or to start your own from.")] = None,
) -> None:
    """List the shipped recipes, or print one."""
    from modeling_deepseek_moe.finetune.errors import nearest
    from modeling_deepseek_moe.finetune.recipe.load import SHIPPED

    if name is None:
        width = max(map(len, SHIPPED))
        for each in SHIPPED:
            _line(each.ljust(width), f"  {_summary(each)}")
    elif name.removesuffix(".yaml") in SHIPPED:
        print(SHIPPED[name.removesuffix(".yaml")].read_text("utf-8"), end="")
    else:
        raise UserError(f"no recipe is named {name!r}: did you mean {nearest(name, SHIPPED)!r}?")


def keys(
    word: Annotated[
        str | None, typer.Argument(help="Only keys with this in their name, or else in their description.")
    ] = None,
) -> None:
    """Show the keys that a recipe can have, each with type, default and a line."""
    from modeling_deepseek_moe.finetune.errors import nearest
    from modeling_deepseek_moe.finetune.recipe.keys import find_keys, recipe_keys

    found = find_keys(word or "")
    if not found:
        hint = nearest(word, [key.name for key in recipe_keys()])
        raise UserError(f"no key has {word!r} in its name or description: did you mean `{hint}`?")
    _print_keys(found)


class WithKeys(TyperCommand):
    """A verb whose help ends with all keys of recipes, and that says how keys are written."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parses; an option that is a recipe's key is refused by saying what to write instead."""
        options = {name for parameter in self.params for name in parameter.opts}
        for place, word in enumerate(args):
            name, _, value = word.removeprefix("--").partition("=")
            key = name.replace("-", "_")
            if word.startswith("--") and word.partition("=")[0] not in options and _is_key(key):
                value = value or " ".join(args[place + 1 : place + 2])
                raise typer.BadParameter(f"--{name}: keys of a recipe have no dashes in front: {key}={value}", ctx=ctx)
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Prints the help, then the keys."""
        from modeling_deepseek_moe.finetune.recipe.keys import recipe_keys

        super().format_help(ctx, formatter)
        print("Keys (deepseek-moe keys WORD shows some of them):\n")
        _print_keys(recipe_keys())


def _is_key(name: str) -> bool:
    from modeling_deepseek_moe.finetune.recipe.keys import recipe_keys

    return name in {key.name for key in recipe_keys()}


def _summary(recipe: str) -> str:
    """The sentence with which a shipped recipe begins."""
    from modeling_deepseek_moe.finetune.recipe.load import SHIPPED

    text = SHIPPED[recipe].read_text("utf-8").partition("\n#   ")[0]
    return text.replace("\n# ", " ").removeprefix("# ").partition(". ")[0].rstrip(".")


def _print_keys(found: Any) -> None:
    for key in found:
        default = "needed" if key.default is None else key.default
        _line(key.name, f"  {key.type} = {default}" if key.default is not None else f"  {key.type}, {default}")
        if key.line:
            _line("", f"    {key.line}")


def _line(name: str, rest: str) -> None:
    Console(soft_wrap=True, highlight=False).print(Text(name, style="bold"), Text(rest), sep="")
