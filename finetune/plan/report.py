"""What `deepseek-moe plan` prints: one recipe's memory, or a table of all recipes and models."""

import json
import re
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from modeling_deepseek_moe.latent_cache import cache_elements

from ..errors import UserError
from ..recipe.load import SHIPPED
from .fit import (
    GIB,
    GPUS,
    MOST_ROWS,
    MOST_TOKENS,
    advise,
    can_shard,
    changed,
    find_config,
    largest,
    need_of,
    plan_recipe,
    read_memory,
)
from .layout_report import layout_facts, show_layouts
from .layouts import USUAL, has_layouts
from .memory import MemoryPlan

TABLE_MODELS = {
    "deepseek-moe-16b": "DeepSeekMoE 16B",
    "deepseek-v2-lite": "DeepSeek-V2-Lite",
    "moonlight-16b-a3b": "Moonlight 16B-A3B",
    "deepseek-v3": "DeepSeek-V3",
}
_SINGLE, _LARGEST = (24, 48, 80), 80


def plan_memory(
    model: str, recipe: str, overrides: list[str], gpu_memory: str | None, gpus: str = "1", as_json: bool = False
) -> None:
    """Print what a training step needs, where it fits, and advice where it does not; of several GPUs also layouts.

    Args:
        model: folder, Hub name or name of a released model.
        recipe: a YAML file or the name of a shipped recipe.
        overrides: `key=value` that win over the recipe.
        gpu_memory: memory of one GPU, with a unit.
        gpus: how many there are, or several such numbers with commas between, of which only layouts are printed.
        as_json: print JSON instead of a table.

    Raises:
        UserError: the model, the recipe or a number is wrong.
    """
    counts = read_gpus(gpus)
    available = None if gpu_memory is None else read_memory(gpu_memory)
    found = []
    for count in counts:
        facts = plan_facts(model, recipe, overrides, available, count)
        if count > 1 and has_layouts(plan_recipe(recipe, model, overrides)):
            facts |= layout_facts(model, recipe, overrides, available or USUAL, count)
        found.append(facts)
        if as_json:
            continue
        if len(counts) == 1 or "layouts" not in facts:
            _show(facts)
        if "layouts" in facts:
            show_layouts(facts)
    if as_json:
        print(json.dumps(found[0] if len(counts) == 1 else found, indent=2))


def read_gpus(text: str) -> list[int]:
    """The numbers of "8" or "8,64,256".

    Raises:
        UserError: there is something else in it.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(re.fullmatch(r"[0-9]{1,9}", word) and int(word) for word in words):
        raise UserError(f"--gpus is {text}: it is a number of GPUs, at least 1, or several with commas between: 8,64")
    return [int(word) for word in words]


def plan_facts(
    model: str, recipe: str, overrides: list[str], available: int | None = None, gpus: int = 1
) -> dict[str, Any]:
    """What `plan_memory` says, in bytes: the need of one GPU by part, and given `available` what fits into that.

    Raises:
        UserError: as `plan_memory`.
    """
    settings = plan_recipe(recipe, model, overrides)
    config = find_config(model)
    plan = MemoryPlan(config, settings)
    memory = plan.memory()
    need = need_of(plan, memory, gpus)
    facts: dict[str, Any] = {
        "model": model,
        "recipe": recipe,
        "rows": plan.rows,
        "length": settings.max_length,
        "gpus": gpus,
        "parameters": sum(p.numel for p in plan.parameters),
        "trained_parameters": memory.trained,
        "parts": need.parts,
        "estimates": need.estimates,
        "total": need.total,
        "moment": memory.moment,
        "cache_bytes_per_token": 2 * cache_elements(config),  # in half precision
        "is_sharded": gpus > 1 and can_shard(plan),
    }
    if available is None:
        return facts

    def fits(rows: int | None = None, length: int | None = None) -> bool:
        return need_of(plan, plan.memory(rows, length), gpus).total <= available

    facts |= {
        "available": available,
        "fits": need.total <= available,
        "most_rows": largest(lambda rows: fits(rows=rows), MOST_ROWS),
        "longest_rows": largest(lambda length: fits(length=length), MOST_TOKENS),
    }
    advice = [] if facts["fits"] else advise(config, settings, available, gpus)
    facts["advice"] = [{"changes": list(each.changes), "total": each.need, "fits": each.fits} for each in advice]
    return facts


def _show(facts: dict[str, Any]) -> None:
    console = Console()
    where = "on one GPU" if facts["gpus"] == 1 else f"on each of {facts['gpus']} GPUs"
    rows = f"{facts['rows']} row{'s' * (facts['rows'] > 1)} of {facts['length']:,} tokens"
    console.print(f"{facts['recipe']} on {facts['model']}: {rows}, {where}", highlight=False)
    table = Table("part", "GiB", show_footer=True)
    table.columns[0].footer, table.columns[1].footer = "together", f"{facts['total'] / GIB:.2f}"
    table.columns[1].justify = "right"
    for name, size in {**facts["parts"], **facts["estimates"]}.items():
        table.add_row(name, f"{size / GIB:.2f}")
    console.print(table)
    share = facts["trained_parameters"] / facts["parameters"]
    console.print(f"trained: {facts['trained_parameters']:,} of {facts['parameters']:,} parameters ({share:.2%})")
    console.print(f"most memory is in use in: {facts['moment']}")
    if facts["gpus"] > 1:
        how = "FSDP or ZeRO-3 shard weights, gradients and optimizer state"
        console.print(how if facts["is_sharded"] else "weights in four bits are not sharded: every GPU holds all")
    token = facts["cache_bytes_per_token"]
    console.print(
        f"generation keeps {token / 2**10:.1f} KiB a token: {token * 32_768 / GIB:.2f} GiB for 32,768 tokens"
    )
    if "available" not in facts:
        return
    available = facts["available"] / GIB
    if facts["fits"]:
        console.print(f"[green]fits into {available:.0f} GiB[/], {available - facts['total'] / GIB:.1f} GiB are left")
    else:
        console.print(f"[red]does not fit into {available:.0f} GiB[/]")
    if facts["most_rows"]:
        console.print(f"at this length up to {facts['most_rows']:,} rows fit")
    if facts["longest_rows"]:
        console.print(f"so many rows may be up to {facts['longest_rows']:,} tokens long")
    if facts["advice"]:
        advice = Table("change", "GiB", "fits", title="What would help", box=None, title_justify="left")
        for each in facts["advice"]:
            fits = "[green]yes[/]" if each["fits"] else "no"
            advice.add_row("\n".join(each["changes"]), f"{each['total'] / GIB:.1f}", fits)
        console.print(advice)


def plan_table(recipes: list[str] | None = None, models: list[str] | None = None) -> str:
    """The smallest of 24, 48 and 80 GB that a recipe fits on, else how many of 80 GB; in Markdown.

    Args:
        recipes: names of recipes; all shipped ones by default.
        models: names of released models; by default those of `TABLE_MODELS`.
    """
    models = list(TABLE_MODELS) if models is None else models
    lines = [
        "| recipe | " + " | ".join(TABLE_MODELS.get(model, model) for model in models) + " |",
        "|---|" + "---|" * len(models),
    ]
    for recipe in track(list(SHIPPED) if recipes is None else recipes, "planning", console=Console(stderr=True)):
        cells = [smallest_fit(model, recipe) for model in models]
        lines.append(f"| `{recipe}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def smallest_fit(model: str, recipe: str) -> str:
    """One cell of the table: the GPUs, and the GiB that each needs."""
    settings, config = plan_recipe(recipe, model, []), find_config(model)
    plan = MemoryPlan(config, settings)
    memory = plan.memory()
    total = need_of(plan, memory).total
    smallest = next((size for size in _SINGLE if total <= size * GIB), None)
    if smallest:
        return f"{smallest} GB ({total / GIB:.0f})"
    single = {"training__per_device_train_batch_size": 1, "gradient_checkpointing": True}
    one_row = MemoryPlan(config, changed(settings, **single))
    need = need_of(one_row, one_row.memory()).total
    if need <= _LARGEST * GIB:
        return f"{_LARGEST} GB, one row at a time ({need / GIB:.0f})"
    if can_shard(plan):
        for count in GPUS[3:]:
            need = need_of(plan, memory, count).total
            if need <= _LARGEST * GIB:
                return f"{count} x {_LARGEST} GB ({need / GIB:.0f} each)"
    return f"none ({total / GIB:,.0f} on one GPU)"
