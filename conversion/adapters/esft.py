"""ESFT adapters (FACTS 5.4): the trained tensors of a model under published names, and which experts they are."""

import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modeling_deepseek_moe import CheckpointError, DeepseekMoeConfig
from modeling_deepseek_moe.checkpoint_files import FP8_DTYPE, SINGLE_NAME, check_fp8_scales, read_entries
from modeling_deepseek_moe.checkpoint_layout import is_redundant
from modeling_deepseek_moe.fp8_blocks import FP8_BLOCK, SCALE_SUFFIX
from modeling_deepseek_moe.parts import expert_of, layer_of, part_of

from ..engine.beside import check_links, read_config
from ..engine.operations import Copy
from ..engine.plan import Plan, Shard, Step, TensorSpec
from ..engine.source import TORCH_DTYPES, SourceCheckpoint, TensorFolder
from ..engine.writing import Reader, same_bytes

ESFT_CONFIG = "expert_cfg.json"

_NUMBER = re.compile(r"0|[1-9][0-9]{0,4}")
_FIELDS = {"experts": dict, "shared_experts": bool, "non_expert_modules": bool}
_COMPARED_AT_ONCE = 4


@dataclass(frozen=True)
class EsftAdapter(TensorFolder):
    """An ESFT adapter whose files are sound; `config_json` is its `expert_cfg.json`, with all three fields."""


def open_esft(folder: str | os.PathLike) -> EsftAdapter:
    """Reads `expert_cfg.json` and the headers of all safetensors files of an ESFT adapter.

    Raises:
        CheckpointError: one line that names file and tensor or field.
    """
    folder = Path(folder).resolve()
    config_json = read_expert_cfg(folder / ESFT_CONFIG)
    files = sorted(entry.name for entry in folder.iterdir() if entry.suffix == ".safetensors")
    if not files:
        raise CheckpointError(f"{folder} has no safetensors file; pickles are not read")
    check_links(folder, files)
    file_of, entries = {}, {}
    for file in files:
        for name, entry in read_entries(folder / file).items():
            if name in file_of:
                raise CheckpointError(f"{folder / file}: tensor {name} is in {file_of[name]} as well")
            if entry.dtype not in TORCH_DTYPES:
                raise CheckpointError(f"{folder / file}: tensor {name} is {entry.dtype}, which is not read")
            file_of[name], entries[name] = file, entry
    return EsftAdapter(folder, config_json, file_of, entries)


def read_expert_cfg(path: str | os.PathLike) -> dict[str, Any]:
    """The `expert_cfg.json` of ESFT, with all three fields; what it says is of some model, not yet of which.

    Raises:
        CheckpointError: one line that names file and field.
    """
    path = Path(path)
    found = read_config(path.parent, path.name)
    config_json: dict[str, Any] = {}
    for field, kind in _FIELDS.items():
        config_json[field] = found.pop(field, None if field == "experts" else False)
        if not isinstance(config_json[field], kind):
            raise CheckpointError(f"{path}: {field}={config_json[field]!a} is not a JSON {_JSON_NAMES[kind]}")
    if found:
        raise CheckpointError(f"{path}: {min(found)} is none of {', '.join(_FIELDS)}")
    for layer, experts in config_json["experts"].items():
        sound = isinstance(experts, list) and all(type(expert) is int for expert in experts)
        if not _NUMBER.fullmatch(layer) or not sound or len(set(experts)) < len(experts):
            raise CheckpointError(
                f"{path}: experts of layer {layer!a} are {experts!a}, not a list of different numbers"
            )
    return config_json


_JSON_NAMES = {dict: "object", bool: "boolean"}


def check_expert_cfg(
    config_json: dict[str, Any], config: DeepseekMoeConfig, path: str | os.PathLike, model: str | os.PathLike
) -> None:
    """Raises a CheckpointError for a layer or expert of an `expert_cfg.json` at `path` that `model` does not have."""
    depth = config.num_hidden_layers + config.num_nextn_predict_layers
    for layer, experts in config_json["experts"].items():
        if int(layer) >= depth or not config.is_moe_layer(int(layer)):
            raise CheckpointError(f"{path}: layer {layer} of {model} has no routed experts")
        wrong = next((expert for expert in experts if not 0 <= expert < config.n_routed_experts), None)
        if wrong is not None:
            raise CheckpointError(f"{path}: layer {layer} names expert {wrong}, of {config.n_routed_experts}")


def replaced_by(adapter: EsftAdapter, source: SourceCheckpoint) -> dict[str, str]:
    """The tensors of a checkpoint that an ESFT adapter replaces, and what they are called there.

    Legacy adapters leave out the leading `model.`, and cannot have `lm_head`.

    Raises:
        CheckpointError: the adapter lacks a tensor that its `expert_cfg.json` announces, or has another one.
    """
    return adapted_names(adapter, source.config, source.text_names, source.folder, source.block)


def adapted_names(
    adapter: EsftAdapter,
    config: DeepseekMoeConfig,
    names: Iterable[str],
    model: str | os.PathLike,
    block: tuple[int, int] = FP8_BLOCK,
) -> dict[str, str]:
    """`replaced_by` for any model with these tensor `names`, whose FP8 weights have blocks of `block`."""
    check_expert_cfg(adapter.config_json, config, adapter.folder / ESFT_CONFIG, model)
    is_legacy = not any(name.startswith("model.") for name in adapter.entries)
    keys = {f"model.{name}" if is_legacy and name != "lm_head.weight" else name: name for name in adapter.entries}
    announced = set(trained_names(adapter.config_json, names))
    shapes = {name: (adapter.entries[key].dtype, adapter.entries[key].shape) for name, key in keys.items()}
    check_fp8_scales(shapes, str(adapter.folder), block)
    for name in announced:
        is_free = is_redundant(name) or (is_legacy and name == "lm_head.weight")
        weight = keys.get(name.removesuffix(SCALE_SUFFIX))
        is_scale_of_plain = name.endswith(SCALE_SUFFIX) and weight and adapter.entries[weight].dtype != FP8_DTYPE
        if name not in keys and not is_free and not is_scale_of_plain:
            raise CheckpointError(f"{adapter.folder} lacks tensor {name}, which {ESFT_CONFIG} announces")
    for name, key in keys.items():
        if name not in announced:
            raise CheckpointError(
                f"{adapter.folder / adapter.file_of[key]}: tensor {key} is none that {ESFT_CONFIG} announces of "
                f"{model}"
            )
    return keys


def plan_esft(tuned: SourceCheckpoint, base: SourceCheckpoint) -> Plan:
    """The ESFT adapter that makes `tuned` of `base`; reads both, since the plan depends on every bit.

    An expert, the shared experts of all layers, or everything else is written whole as soon as one bit differs.

    Raises:
        CheckpointError: the checkpoints do not have the same tensors, or are equal.
    """
    for name in sorted({*tuned.text_names, *base.text_names}):
        one, other = tuned.entries.get(name), base.entries.get(name)
        if one is None or other is None or one[:2] != other[:2]:
            described = [f"{entry.dtype} {list(entry.shape)}" if entry else "missing" for entry in (one, other)]
            raise CheckpointError(
                f"tensor {name} is {described[0]} in {tuned.folder}, but {described[1]} in {base.folder}; an ESFT "
                "adapter needs both in the same format"
            )
    config_json = _expert_cfg(tuned.config, set(_different(tuned, base)))
    steps = [
        Step(Copy(), (name,), (TensorSpec(name, tuned.dtype(name), tuned.entries[name].shape),))
        for name in trained_names(config_json, tuned.text_names)
    ]
    if not steps:
        raise CheckpointError(f"{tuned.folder} and {base.folder} are equal; there is nothing to write")
    return Plan(
        tuned,
        "esft",
        (Shard(SINGLE_NAME, tuple(steps)),),
        config_json,
        (),
        config_name=ESFT_CONFIG,
        with_index=False,
        read_back=open_esft,
        without_logits="an adapter is no model",
    )


def _different(tuned: SourceCheckpoint, base: SourceCheckpoint) -> Iterator[str]:
    with Reader(tuned) as one, Reader(base) as other, ThreadPoolExecutor(_COMPARED_AT_ONCE) as pool:
        names = tuned.text_names
        for name in names:
            one.file(name), other.file(name)  # opened here, so that two threads do not open one twice
        same = pool.map(lambda name: same_bytes(one, other, name, name), names)
        yield from (name for name, is_same in zip(names, same, strict=True) if not is_same)


def _expert_cfg(config: DeepseekMoeConfig, names: set[str]) -> dict[str, Any]:
    depth = config.num_hidden_layers + config.num_nextn_predict_layers
    experts: dict[int, set[int]] = {layer: set() for layer in range(depth) if config.is_moe_layer(layer)}
    shared = others = False
    for name in names:
        if (expert := expert_of(name)) is not None:
            experts[layer_of(name)].add(expert)
        elif part_of(name) == "shared_experts":
            shared = True
        else:
            others = True
    by_layer = {str(layer): sorted(chosen) for layer, chosen in experts.items()}
    return {"experts": by_layer, "shared_experts": shared, "non_expert_modules": others}


def trained_names(config_json: dict[str, Any], names: Iterable[str]) -> Iterator[str]:
    """The names among `names` of the tensors that an `expert_cfg.json` says were trained."""
    chosen = {(int(layer), expert) for layer, experts in config_json["experts"].items() for expert in experts}
    for name in names:
        if (expert := expert_of(name)) is not None:
            is_trained = (layer_of(name), expert) in chosen
        else:
            is_trained = config_json["shared_experts" if part_of(name) == "shared_experts" else "non_expert_modules"]
        if is_trained:
            yield name
