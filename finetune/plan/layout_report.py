"""What `deepseek-moe plan --gpus N` prints of layouts, and their table of released models."""

import time
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from .fit import GIB, find_config, plan_recipe
from .layouts import USUAL, RankNeed, plan_layouts, recommended

TABLE_MODELS = {
    "deepseek-v2-lite": "DeepSeek-V2-Lite",
    "moonlight-16b-a3b": "Moonlight 16B-A3B",
    "deepseek-v2": "DeepSeek-V2",
    "deepseek-v3": "DeepSeek-V3",
    "kimi-k2": "Kimi-K2",
}
TABLE_RECIPE = ("full", ["dtype=bfloat16"])
FAMILIES = ("DDP", "FSDP", "HSDP", "EP", "TP")
_PARTS = ("weights", "gradients", "optimizer", "gathered", "activations")


def layout_facts(model: str, recipe: str, overrides: list[str], available: int, gpus: int) -> dict[str, Any]:
    """The layouts that can be had, those that send least first, in bytes, and the one to take.

    Args:
        model, recipe, overrides: as for `report.plan_facts`.
        available: bytes of one GPU.
        gpus: ranks.

    Raises:
        UserError: as `layouts.plan_layouts`.
    """
    start = time.perf_counter()
    needs = plan_layouts(find_config(model), plan_recipe(recipe, model, overrides), gpus)
    best, fits = recommended(needs, available)
    return {
        "gpus": gpus,
        "layouts": [_facts_of(each, available) for each in needs],
        "recommended": best.layout.name,
        "recommended_fits": fits,
        "layouts_available": available,
        "layout_seconds": time.perf_counter() - start,
    }


def _facts_of(need: RankNeed, available: int) -> dict[str, Any]:
    return {
        "name": need.layout.name,
        "line": need.layout.line,
        "fullest_rank": need.fullest,
        **{part: getattr(need, part) for part in _PARTS},
        "total": need.total,
        "fits": need.total <= available,
        "sent": need.sent,
        "outside": need.outside,
        "traffic": {each.kind: {"payload": each.payload, "sent": each.sent} for each in need.traffic},
    }


def show_layouts(facts: dict[str, Any]) -> None:
    """Print the layouts of `layout_facts`."""
    console = Console()
    available = f"{facts['layouts_available'] / GIB:.0f} GiB"
    title = f"Layouts of {facts['gpus']:,} GPUs: GiB on the fullest rank, GB that each sends"
    table = Table(
        "layout", *_PARTS, "together", "fits", "sent", "outside", box=None, title=title, title_justify="left"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for each in facts["layouts"]:
        sizes = (f"{each[part] / GIB:.2f}" for part in (*_PARTS, "total"))
        fits = "[green]yes[/]" if each["fits"] else "no"
        table.add_row(each["name"], *sizes, fits, f"{each['sent'] / 1e9:.1f}", f"{each['outside'] / 1e9:.1f}")
    console.print(table)
    best = next(each for each in facts["layouts"] if each["name"] == facts["recommended"])
    line = best["line"] or "no `parallel:` line; torchrun alone is DDP"
    if facts["recommended_fits"]:
        console.print(f"take {best['name']}: {line}", highlight=False)
    else:
        console.print(f"none fits into {available}; {best['name']} needs least: {line}", highlight=False)
    if "Shard(1)" in best["name"]:
        plain = next(
            (each for each in facts["layouts"] if each["line"] == best["line"] and "Shard(1)" not in each["name"]),
            best,
        )
        console.print(
            "Shard(1): FSDP has to cut experts on their second dimension (`shard_placement_fn`); on the first, as it "
            f"does by itself, some ranks hold none and the fullest {plain['total'] / GIB:.2f} GiB together",
            highlight=False,
        )
    console.print(
        "sent in a step of one micro-batch, computed; outside: of that, out of a machine of 8 "
        f"({facts['layout_seconds']:.1f} s)",
        highlight=False,
    )


def layout_table(counts: list[int], models: list[str] | None = None) -> str:
    """For each model and number of GPUs the best layout of each kind, in Markdown; bold is the one to take.

    Args:
        counts: of GPUs.
        models: names of released models; by default those of `TABLE_MODELS`.
    """
    lines = ["| model | GPUs | " + " | ".join(FAMILIES) + " |", "|---|---|" + "---|" * len(FAMILIES)]
    pairs = [(model, count) for model in models or TABLE_MODELS for count in counts]
    for model, count in track(pairs, "planning", console=Console(stderr=True)):
        config = find_config(model)
        needs = plan_layouts(config, plan_recipe(TABLE_RECIPE[0], model, TABLE_RECIPE[1]), count)
        best, fits = recommended(needs, USUAL)
        cells = []
        for family in FAMILIES:
            of_family = [each for each in needs if family_of(each) == family]
            chosen = best if best in of_family else recommended(of_family, USUAL)[0] if of_family else None
            cells.append(_cell(chosen, chosen is best and fits) if chosen else "")
        lines.append(f"| {TABLE_MODELS.get(model, model)} | {count:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def family_of(need: RankNeed) -> str:
    """Which of `FAMILIES` a layout belongs to."""
    return next(family for family in ("DDP", "EP", "TP", "HSDP", "FSDP") if family in need.layout.name.split())


def _cell(need: RankNeed, is_best: bool) -> str:
    name = "" if need.layout.is_ddp else f"{need.layout.name}: "
    text = f"{name}{need.total / GIB:,.0f} GiB, {need.sent / 1e9:,.0f} GB"
    return f"**{text}**" if is_best else text
