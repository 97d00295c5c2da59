"""What a call of `convert` asks for: options held against the format, folders opened, the plan made."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .adapters.esft import plan_esft
from .adapters.files import open_adapter
from .adapters.merging import apply_adapter
from .adapters.names import KV_B_CHOICES, plan_per_expert, plan_stacked
from .adapters.overlay import is_below
from .engine.plan import Plan
from .engine.source import open_source
from .engine.target import ConversionError
from .formats.inference_config import INFERENCE
from .formats.table import FORMATS, open_checkpoint, plan_conversion
from .upcycle.split import UPCYCLE

ADAPTER_FORMATS = {
    "peft": "an adapter as PEFT writes it for stacked experts",
    "peft-native": "an adapter as PEFT loads it on transformers' own deepseek_v2 and deepseek_v3 classes",
    "peft-per-expert": "an adapter with a pair for every expert, as vLLM and SGLang read it",
    "esft": "the trained tensors of a checkpoint beside those of its base",
}

_CHECKPOINTS = tuple(FORMATS)
_FORMATS_OF_OPTION = {
    "dtype": _CHECKPOINTS,
    "source_format": _CHECKPOINTS,
    "mp": (INFERENCE,),
    "adapter": _CHECKPOINTS,
    "only": _CHECKPOINTS,
    "base": ("esft",),
    "kv_b_proj": ("peft-per-expert",),
}


@dataclass(frozen=True)
class Request:
    """A conversion that can start.

    Attributes:
        plan: what is written.
        record: what makes it another one than that of other options.
    """

    plan: Plan
    record: dict[str, Any]


def plan_request(source: str | os.PathLike, target: str | os.PathLike, to: str, options: dict[str, Any]) -> Request:
    """Checks the options and makes the plan.

    Args:
        source: the folder that is read.
        target: the folder that will be written.
        to: a format, "upcycle" excepted.
        options: arguments of `convert`; None means that one is not given.

    Raises:
        ValueError: an unknown format, or an option that the format does not take.
        CheckpointError: a folder is broken, or cannot be expressed in the format.
        ConversionError: the target lies in a folder that is only read.
    """
    if to not in FORMATS and to not in ADAPTER_FORMATS:
        raise ValueError(f"format {to!r} is not one of {', '.join([*FORMATS, UPCYCLE, *ADAPTER_FORMATS])}")
    given = {option: value for option, value in options.items() if value is not None}
    for option, value in given.items():
        formats = _FORMATS_OF_OPTION[option]
        if to not in formats:
            raise ValueError(f"{option}={_shown(value)} belongs to the format {' or '.join(formats)}, not to {to!r}")
    for option in ("adapter", "base"):
        if option in given and is_below(Path(target), Path(given[option])):
            raise ConversionError(f"{target} lies in {given[option]}, which is only read; give a folder outside of it")
    if to in FORMATS:
        return _checkpoint(source, to, **given)
    if to == "esft":
        return _esft(source, **given)
    if to in ("peft", "peft-native"):
        return Request(plan_stacked(open_adapter(source), to), {"to": to})
    return _per_expert(source, **given)


def _checkpoint(
    source: str | os.PathLike,
    to: str,
    dtype: str | None = None,
    source_format: str | None = None,
    mp: int | None = None,
    adapter: str | os.PathLike | None = None,
    only: Sequence[str] = (),
) -> Request:
    checkpoint = open_checkpoint(source, source_format)
    record = {"to": to, "dtype": dtype, **({"mp": mp or 1} if to == INFERENCE else {})}
    if adapter is None:
        if only:
            raise ValueError(f"--only {_shown(only)} chooses modules of an adapter; give --adapter too")
        return Request(plan_conversion(checkpoint, to, dtype, mp), record)
    modules = tuple(sorted({module.strip() for names in only for module in names.split(",")} - {""}))
    applied = apply_adapter(checkpoint, adapter, modules)
    record |= {"adapter": applied.adapter.fingerprint(), "only": list(modules)}
    return Request(plan_conversion(checkpoint, to, dtype, mp, applied), record)


def _esft(source: str | os.PathLike, base: str | os.PathLike | None = None) -> Request:
    if base is None:
        raise ValueError("the format 'esft' holds what differs from a base; give --base FOLDER")
    tuned, original = open_source(source), open_source(base)
    return Request(plan_esft(tuned, original), {"to": "esft", "base": original.fingerprint()})


def _per_expert(source: str | os.PathLike, kv_b_proj: str | None = None) -> Request:
    if kv_b_proj not in (None, *KV_B_CHOICES):
        raise ValueError(f"--kv-b-proj {kv_b_proj} is not one of {', '.join(KV_B_CHOICES)}")
    plan = plan_per_expert(open_adapter(source), kv_b_proj)
    return Request(plan, {"to": "peft-per-expert", "kv_b_proj": kv_b_proj})


def _shown(value: Any) -> str:
    return ",".join(value) if isinstance(value, list | tuple) else str(value)
