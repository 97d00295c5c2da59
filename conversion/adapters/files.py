"""A PEFT LoRA adapter folder, checked before any tensor is read; pickles are refused.

PEFT 0.21 wraps each stacked weight of an experts module in a layer of its own, the first one inside:
`experts.base_layer.lora_A` belongs to `gate_up_proj` and `experts.lora_A` to `down_proj`, or to the only one that is
adapted. A of `E` experts is `(E * r, in)`, expert after expert; B is `(out, r * E)`, with the experts innermost.
"""

import dataclasses
import math
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modeling_deepseek_moe import CheckpointError
from modeling_deepseek_moe.checkpoint_files import TensorEntry, read_entries

from ..engine.beside import check_links, is_other_file, read_config
from ..engine.source import TensorFolder
from .patterns import problem_of_patterns

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_PREFIX = "base_model.model."
STACKED = (".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")
EXPERT = re.compile(r"(?P<experts>.+\.mlp\.experts)\.(?P<expert>0|[1-9]\d{0,4})\.(?P<projection>gate|up|down)_proj")

_PICKLES = ("adapter_model.bin", "adapter_model.pt")
_DTYPES = ("F32", "F16", "BF16")
_LORA_KEY = re.compile(r"(?P<module>[\w.]+)\.lora_(?:(?P<factor>[AB])\.weight|embedding_(?P<embedding>[AB]))")
# PEFT saves these whole where they are adapted, were resized, or somebody asked for it.
_EMBEDDING_OR_HEAD = re.compile(r"(?P<module>(?:[\w.]+\.)?(?:embed_tokens|lm_head))(?:\.base_layer)?\.weight")
_EMBEDDING = ".embed_tokens"
_WRAPPED = re.compile(r"(?P<experts>.+\.mlp\.experts)(?P<inner>\.base_layer)?")
# What a field says besides the factors themselves; every other field must be unset.
_READ_FIELDS = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules"}
_READ_FIELDS |= {"target_parameters", "modules_to_save", "peft_type", "bias", "init_lora_weights"}
_FIELDS_OF_TRAINING = {
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version"),
    *("megatron_config", "megatron_core", "lora_dropout", "loftq_config", "eva_config", "runtime_config"),
    *("exclude_modules", "layers_to_transform", "layers_pattern", "qalora_group_size", "ensure_weight_tying"),
}
# The other ways to start change the base weights, so that the adapter does not fit the base as it was.
_INITIAL_WEIGHTS = (True, False, "gaussian", "eva", "orthogonal", None)


@dataclass(frozen=True)
class Pair:
    """The two factors of one weight, to which `scaling * B A` is added.

    Attributes:
        a, b: their keys.
        rank, scaling: what holds for this weight, whatever the patterns of the config are.
        experts: how many a stacked weight has; None for one matrix.
        is_embedding: whether the weight has a row for each token; it gets the transposed product.
    """

    a: str
    b: str
    rank: int
    scaling: float
    experts: int | None = None
    is_embedding: bool = False


@dataclass(frozen=True)
class LoraAdapter(TensorFolder):
    """A sound LoRA adapter.

    Attributes:
        pairs: factors by the adapted module's name in the model, or by the parameter's if it is stacked.
        parameters: those of `pairs` that PEFT adapts as bare parameters, named without the final `.weight`.
        saved: keys of whole tensors that replace the base's, by the tensor's name.
        in_place: those of `saved` that are the base's own embedding or head, and not copies beside them
            (`modules_to_save`): where these two are one weight, it stays one.
        other_files: names of what lies beside them.
    """

    pairs: dict[str, Pair]
    parameters: tuple[str, ...]
    saved: dict[str, str]
    in_place: frozenset[str]
    other_files: tuple[str, ...]


def open_adapter(folder: str | os.PathLike) -> LoraAdapter:
    """Reads the config and the header of an adapter folder, and checks that together they are one sound LoRA adapter.

    Raises:
        CheckpointError: one line that names file and tensor or field.
    """
    folder = Path(folder).resolve()
    config_json = read_config(folder, ADAPTER_CONFIG)
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        pickle = next((name for name in _PICKLES if (folder / name).exists()), None)
        hint = f"; {pickle} is a pickle, which can run code and is not read" if pickle else ""
        raise CheckpointError(f"{folder} has no {ADAPTER_WEIGHTS}{hint}")
    others = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_file() and is_other_file(entry.name)))
    others = tuple(name for name in others if name != ADAPTER_CONFIG and not name.endswith(".py"))
    check_links(folder, (ADAPTER_WEIGHTS, *others))
    entries = read_entries(path)
    config = _Config(folder / ADAPTER_CONFIG, config_json)
    pairs, saved, in_place = _pairs(path, entries, config)
    parameters = tuple(name for name in pairs if name.endswith(STACKED) or config.is_parameter(f"{name}.weight"))
    file_of = dict.fromkeys(entries, ADAPTER_WEIGHTS)
    return LoraAdapter(folder, config_json, file_of, entries, pairs, parameters, saved, in_place, others)


class _Config:
    """What `adapter_config.json` says about each weight."""

    def __init__(self, path: Path, fields: dict[str, Any]):
        self.path, self.fields = path, fields
        self._check("peft_type", lambda value: value == "LORA", "only LORA is")
        self._check("bias", lambda value: value in (None, "none"), "only 'none' is")
        self._check("init_lora_weights", lambda value: value in _INITIAL_WEIGHTS, "it changes the base weights")
        for name in fields.keys() - _READ_FIELDS - _FIELDS_OF_TRAINING:
            self._check(name, lambda value: not value, "only plain LoRA is")
        check_lora_fields(path, fields)

    def is_parameter(self, name: str) -> bool:
        """Whether PEFT adapts this parameter as one."""
        return _ends_with(name, self.fields.get("target_parameters"))

    def is_saved(self, name: str) -> bool:
        modules = self.fields.get("modules_to_save") or ()
        return any(f".{module}." in f".{name}" for module in modules)

    def rank(self, name: str) -> int:
        return self._of_pattern("rank_pattern", name, self.fields["r"])

    def scaling(self, name: str) -> float:
        alpha = self._of_pattern("alpha_pattern", name, self.fields["lora_alpha"])
        return scaling_of(alpha, self.rank(name), bool(self.fields.get("use_rslora")))

    def _of_pattern(self, field: str, name: str, default: Any) -> Any:
        """The first pattern that matches decides, as in PEFT."""
        for pattern, value in (self.fields.get(field) or {}).items():
            if re.match(_whole(pattern), name):
                return value
        return default

    def _check(self, name: str, is_sound: Callable[[Any], bool], reason: str) -> None:
        _check(self.path, self.fields, name, is_sound, reason)


def check_lora_fields(path: Path, fields: dict[str, Any]) -> None:
    """Checks the numbers, names and patterns of a LoRA config, whatever else it says.

    Args:
        path: of the file, for the message.
        fields: what it holds.

    Raises:
        CheckpointError: one line that names file and field.
    """

    def check(name: str, is_sound: Callable[[Any], bool], reason: str) -> None:
        _check(path, fields, name, is_sound, reason)

    check("r", _is_rank, "not a positive number")
    check("lora_alpha", _is_factor, "not a number other than 0")
    check("use_rslora", lambda value: value is None or type(value) is bool, "not true or false")
    for name, is_value in (("rank_pattern", _is_rank), ("alpha_pattern", _is_factor)):
        check(name, lambda value, of=is_value: _is_pattern(value, of), "not an object of patterns and numbers")
        _check_patterns(path, name, fields.get(name) or {})
    for name in ("target_parameters", "modules_to_save"):
        check(name, _are_names, "not a list of names")
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        check(name, lambda value: isinstance(value, str) or _are_names(value), "neither a pattern nor a list of names")
        if isinstance(fields.get(name), str):
            _check_patterns(path, name, [fields[name]])


def _check_patterns(path: Path, name: str, patterns: Iterable[str]) -> None:
    if problem := problem_of_patterns(patterns):
        raise CheckpointError(f"{path}: {name} is not read: {problem}")


def _check(path: Path, fields: dict[str, Any], name: str, is_sound: Callable[[Any], bool], reason: str) -> None:
    value = fields.get(name)
    if not is_sound(value):
        raise CheckpointError(f"{path}: {name}={shortened(value)} is not read: {reason}")


def shortened(value: Any) -> str:
    """A value of a config in ASCII, for an error."""
    text = ascii(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def scaling_of(alpha: float, rank: int, use_rslora: bool) -> float:
    """What PEFT multiplies B A by."""
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 31


def _is_factor(value: Any) -> bool:
    return type(value) in (int, float) and 1e-30 < abs(value) < 1e30


def _is_pattern(value: Any, is_value: Callable[[Any], bool]) -> bool:
    if value is None:
        return True
    return isinstance(value, dict) and all(map(is_value, value.values()))


def _whole(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


def _are_names(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(name, str) and name for name in value))


def _ends_with(name: str, endings: list[str] | None) -> bool:
    return any(f".{name}".endswith(f".{ending}") for ending in endings or ())


def _pairs(
    path: Path, entries: dict[str, TensorEntry], config: _Config
) -> tuple[dict[str, Pair], dict[str, str], frozenset[str]]:
    factors: dict[str, dict[str, str]] = {}
    saved, in_place = {}, set()
    for key, entry in entries.items():
        name = key.removeprefix(ADAPTER_PREFIX)
        lora, whole = _LORA_KEY.fullmatch(name), _EMBEDDING_OR_HEAD.fullmatch(name)
        if name == key or not (lora or whole or config.is_saved(name)):
            raise CheckpointError(f"{path}: tensor {key} is neither a LoRA factor nor one of modules_to_save")
        if entry.dtype not in _DTYPES:
            raise CheckpointError(f"{path}: tensor {key} is {entry.dtype}, not one of {', '.join(_DTYPES)}")
        if lora:
            is_embedding = f".{lora['module']}".endswith(_EMBEDDING)
            if is_embedding != bool(lora["embedding"]):
                kind = "an embedding's" if is_embedding else "a linear layer's or a stacked weight's"
                raise CheckpointError(f"{path}: tensor {key} is not called as {kind} factors are")
            factors.setdefault(lora["module"], {})[lora["factor"] or lora["embedding"]] = key
            continue
        name = name if config.is_saved(name) else f"{whole['module']}.weight"
        if name in saved:
            raise CheckpointError(f"{path}: tensors {saved[name]} and {key} are both {name}")
        saved[name] = key
        in_place |= set() if config.is_saved(name) else {name}
    if not factors:
        raise CheckpointError(f"{path} holds no LoRA factors")
    pairs = {}
    for module, keys in factors.items():
        if len(keys) == 1:
            (key,) = keys.values()
            raise CheckpointError(f"{path}: tensor {key} has no {'AB'.strip(*keys)} beside it")
        name, is_stacked = _adapted(path, module, factors, config, keys["A"])
        pair = _pair(path, entries, config, name, keys, is_stacked)
        pairs[name] = dataclasses.replace(pair, is_embedding=f".{module}".endswith(_EMBEDDING))
    _check_stacks(path, entries, pairs)
    return pairs, saved, frozenset(in_place)


def _adapted(path: Path, module: str, factors, config: _Config, key: str) -> tuple[str, bool]:
    """What the layer PEFT calls `module` adapts, and whether that is a stacked weight."""
    wrapped = _WRAPPED.fullmatch(module)
    if not wrapped:
        return module, False
    experts = wrapped["experts"]
    gate_up, down = f"{experts}.gate_up_proj", f"{experts}.down_proj"
    if wrapped["inner"]:
        return gate_up, True
    if f"{module}.base_layer" in factors:
        return down, True
    named = [name for name in (gate_up, down) if config.is_parameter(name)]
    if len(named) != 1:
        raise CheckpointError(
            f"{path}: tensor {key} belongs to one stacked weight, but target_parameters of {ADAPTER_CONFIG} names "
            f"{len(named)} of {experts}"
        )
    return named[0], True


def _pair(path: Path, entries, config: _Config, name: str, keys: dict[str, str], is_stacked: bool) -> Pair:
    is_parameter = not is_stacked and config.is_parameter(f"{name}.weight")
    pattern_name = f"{name}.weight" if is_parameter else name
    rank, scaling = config.rank(pattern_name), config.scaling(pattern_name)
    a, b = entries[keys["A"]].shape, entries[keys["B"]].shape
    for key, shape in ((keys["A"], a), (keys["B"], b)):
        if len(shape) != 2 or 0 in shape:
            raise CheckpointError(f"{path}: tensor {key} is {list(shape)}, not a matrix")
    rows = a[0]
    if rows != b[1] or (rows % rank if is_stacked else rows != rank):
        many = " for each expert" if is_stacked else ""
        raise CheckpointError(
            f"{path}: tensors {keys['A']} {list(a)} and {keys['B']} {list(b)} contradict rank {rank}{many} of "
            f"{ADAPTER_CONFIG}"
        )
    return Pair(keys["A"], keys["B"], rank, scaling, rows // rank if is_stacked else None)


def _check_stacks(path: Path, entries, pairs: dict[str, Pair]) -> None:
    stacks = {name: pair for name, pair in pairs.items() if pair.experts}
    counts = {pair.experts: name for name, pair in stacks.items()}
    if len(counts) > 1:
        (one, name), (other, other_name), *_ = counts.items()
        raise CheckpointError(f"{path}: {name} has {one} experts, but {other_name} has {other}")
    modules = {name.rpartition(".")[0] for name in stacks}
    for name, pair in pairs.items():
        expert = EXPERT.fullmatch(name)
        if expert and expert["experts"] in modules:
            raise CheckpointError(
                f"{path}: tensor {pair.a} is one expert's, others of {expert['experts']} are stacked"
            )
    for name, pair in stacks.items():
        out = entries[pair.b].shape[0]
        if not name.endswith("gate_up_proj"):
            continue
        down = stacks.get(name.replace("gate_up_proj", "down_proj"))
        hidden, width = entries[pair.a].shape[1], out // 2
        found = (entries[down.b].shape[0], entries[down.a].shape[1]) if down else (hidden, width)
        if out % 2 or found != (hidden, width):
            raise CheckpointError(f"{path}: tensor {pair.b} has {out} rows, which do not fit the other factors")
