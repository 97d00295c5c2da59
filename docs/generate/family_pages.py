"""The page of model families, from the table that the package reads their `config.json` by."""

from repository import ROOT

from modeling_deepseek_moe import DeepseekMoeConfig
from modeling_deepseek_moe.families import FAMILIES, Family
from modeling_deepseek_moe.presets import PRESET_OF_SIBLING, PRESETS

_SHOWN = (
    ("kv_lora_rank", "attention"),
    ("scoring_func", "scores"),
    ("topk_method", "choice"),
    ("norm_topk_prob", "normalised"),
    ("rope_interleave", "rotary pairs"),
)


def pages() -> dict[str, str]:
    """Source path of each page -> its Markdown."""
    parts = ["# Families", (ROOT / "docs/generate/families.md").read_text(encoding="utf-8").strip(), overview()]
    parts += [family_section(name, family) for name, family in FAMILIES.items()]
    return {"models/families.md": "\n\n".join(parts) + "\n"}


def value_of(family: Family, field: str) -> object:
    return family.defaults.get(field, DeepseekMoeConfig.__dict__.get(field))


def overview() -> str:
    rows = ["| `model_type` | saved as | " + " | ".join(title for _, title in _SHOWN) + " |"]
    rows.append("|---" * (len(_SHOWN) + 2) + "|")
    for name, family in FAMILIES.items():
        cells = [f"[`{name}`](#{name})", f"`{name}`" if family.keeps_type else "`deepseek_moe`"]
        for field, _ in _SHOWN:
            value = value_of(family, field)
            if field == "kv_lora_rank":
                cells.append("plain" if value is None else "latent")
            elif field == "rope_interleave":
                cells.append("interleaved" if value else "in halves")
            elif field == "norm_topk_prob":
                cells.append("yes" if value else "no")
            else:
                cells.append(f"`{value}`")
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def family_section(name: str, family: Family) -> str:
    presets = [preset for preset, fields in PRESETS.items() if fields["model_type"] == name]
    presets += [sibling for sibling, preset in PRESET_OF_SIBLING.items() if preset in presets]
    facts = {
        "Presets": ", ".join(f"`{preset}`" for preset in presets),
        "Names of its classes begin with": ", ".join(f"`{prefix}`" for prefix in family.class_prefixes),
        "Its names of fields": ", ".join(f"`{theirs}` for `{ours}`" for theirs, ours in family.renamed.items()),
        "Keys read and dropped": ", ".join(
            f"`{key}`" if values is None else f"`{key}` if {' or '.join(f'`{value!r}`' for value in values)}"
            for key, values in family.only.items()
        ),
        "On disk": "the experts of a layer in two stacked tensors" if family.stacks_experts else "",
    }
    lines = [f"- {label}: {text}" for label, text in facts.items() if text]
    rows = ["| field | where its `config.json` leaves it out |", "|---|---|"]
    rows += [f"| `{field}` | `{value!r}` |" for field, value in family.defaults.items()]
    table = '??? note "What a `config.json` of it leaves out"\n\n' + "\n".join(f"    {row}" for row in rows)
    return f"## {name}\n\n" + "\n".join(lines) + f"\n\n{table}"
