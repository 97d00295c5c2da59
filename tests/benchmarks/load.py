"""`from_pretrained` of one and the same folder in DeepSeek's layout, whose files are in memory already."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from measure import Case, DisagreementError, alternate, compare
from workbench import Workbench

from modeling_deepseek_moe import DeepseekMoeForCausalLM


def cases(bench: Workbench) -> list[Case]:
    return [Case("from_pretrained", lambda: rows(bench))]


def rows(bench: Workbench) -> list[dict[str, Any]]:
    """No goal: both read the same bytes."""
    ours, _ = bench.pair()
    with tempfile.TemporaryDirectory() as folder:
        ours.model.save_pretrained(folder)
        native = bench.size.model_class
        config = bench.size.config_class.from_dict({**bench.fields, "architectures": [native.__name__]})
        config.save_pretrained(folder)
        size = sum(parameter.numel() * parameter.itemsize for parameter in ours.model.parameters())
        _check(folder, ours.model, native)
        sides = {
            name: lambda seed, model_class=model_class: lambda: model_class.from_pretrained(folder, dtype="auto")
            for name, model_class in (("ours", DeepseekMoeForCausalLM), ("theirs", native))
        }
        seconds = alternate(sides, bench.settings.repeats)
    return [
        compare(
            "loading a checkpoint in DeepSeek's layout",
            ("ours", seconds["ours"]),
            ("transformers", seconds["theirs"]),
            checkpoint_bytes=size,
            agreement={"difference": 0.0, "bound": 0.0},
        )
    ]


def _check(folder: str, source: torch.nn.Module, native: type) -> None:
    """Both read what was written, bit for bit."""
    for model_class in (DeepseekMoeForCausalLM, native):
        loaded = dict(model_class.from_pretrained(folder, dtype="auto").named_parameters())
        for name, parameter in source.named_parameters():
            if not torch.equal(loaded[name], parameter):
                raise DisagreementError(f"{model_class.__name__} reads another {name} than was saved")
