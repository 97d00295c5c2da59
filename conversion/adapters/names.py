"""Adapters of routed experts as PEFT stacks them, as vLLM and SGLang read them (one pair a projection and expert), and
as PEFT loads them on transformers' own classes.

The servers read `r` and `lora_alpha`, no patterns, and SGLang not `use_rslora`. So for them all pairs get one rank,
the lower ones by zeros, and one scaling, which is `lora_alpha / r`: what a pair's own is off goes into its B.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from modeling_deepseek_moe import CheckpointError

from ..engine.operations import Copy
from ..engine.plan import Plan, Shard, Step, TensorSpec
from ..engine.writing import Reader, same_bytes
from .files import ADAPTER_CONFIG, ADAPTER_PREFIX, ADAPTER_WEIGHTS, EXPERT, STACKED, LoraAdapter, Pair, open_adapter
from .stacking import Stack, Unstack

KV_B_PROJ = ".self_attn.kv_b_proj"
KV_B_CHOICES = ("keep", "leave-out")

_PROJECTIONS = dict(zip(STACKED, (("gate", "up"), ("down",)), strict=True))

# Endings of modules that PEFT takes for routed experts' on transformers' own classes.
REWRITTEN = (".gate_proj", ".up_proj", ".down_proj", ".gate")
_MERGE = "merge it into its base: deepseek-moe convert BASE DST --to bf16 --adapter ADAPTER"

Settings = dict[str, tuple[int, float]]  # rank and scaling of each adapted module or parameter


def plan_per_expert(adapter: LoraAdapter, kv_b_proj: str | None = None) -> Plan:
    """An adapter as vLLM and SGLang read it.

    Args:
        adapter: one with stacked factors, or with a pair for each expert already.
        kv_b_proj: "keep" or "leave-out" for LoRA on `kv_b_proj`, which vLLM's absorbed decoding does not apply.

    Raises:
        CheckpointError: LoRA on `kv_b_proj` and no choice, whole tensors beside the factors, or nothing is left.
    """
    path = adapter.folder / ADAPTER_WEIGHTS
    if adapter.saved:
        raise CheckpointError(
            f"{path}: {next(iter(adapter.saved))} is a whole tensor (modules_to_save, adapted embedding or head), "
            f"which servers do not take from an adapter; {_MERGE}"
        )
    if embedding := next((pair.a for pair in adapter.pairs.values() if pair.is_embedding), None):
        raise CheckpointError(
            f"{path}: {embedding} adapts the embedding, for which servers have no LoRA layer; {_MERGE}"
        )
    latent = {name for name in adapter.pairs if name.endswith(KV_B_PROJ)}
    if latent and kv_b_proj is None:
        raise CheckpointError(
            f"{path}: {min(latent)} has LoRA, which vLLM leaves out while it decodes: give --kv-b-proj keep, or "
            "--kv-b-proj leave-out and serve a base with that part merged: deepseek-moe convert BASE DST --to bf16 "
            f"--adapter {adapter.folder} --only kv_b_proj"
        )
    left_out = latent if kv_b_proj == "leave-out" else set()
    pairs = {name: pair for name, pair in adapter.pairs.items() if name not in left_out}
    if not pairs:
        raise CheckpointError(f"{path} has LoRA on kv_b_proj only; without it nothing is left")
    rank = max(pair.rank for pair in pairs.values())
    scaling = _usual(pair.scaling for pair in pairs.values())
    steps, settings = [], {}
    for name, pair in pairs.items():
        modules = _modules(name, pair)
        is_parameter = name in adapter.parameters and not pair.experts
        settings |= dict.fromkeys([f"{name}.weight"] if is_parameter else modules, (rank, scaling))
        for factor, key in (("A", pair.a), ("B", pair.b)):
            experts, scale = pair.experts or 1, pair.scaling / scaling
            operation = Unstack(factor, experts, len(modules) // experts, rank, scale)
            rows, columns = adapter.entries[key].shape
            shape = (rank, columns) if factor == "A" else (rows * experts // len(modules), rank)
            specs = tuple(TensorSpec(_key(module, factor), adapter.dtype(key), shape) for module in modules)
            is_same = not pair.experts and (pair.rank, scale) == (rank, 1)
            steps.append(Step(Copy() if is_same else operation, (key,), specs))
    return _plan(adapter, "peft-per-expert", steps, settings, use_rslora=False)


def plan_stacked(adapter: LoraAdapter, to: str = "peft") -> Plan:
    """An adapter as PEFT writes it for stacked experts.

    Where gate and up projection have an A of their own, the stacked factors have both ranks together.

    Args:
        adapter: stacked or per expert.
        to: "peft"; or "peft-native" for transformers' own classes of DeepSeek models. There PEFT 0.21 takes every
            target module called `gate_proj`, `up_proj`, `down_proj` or `gate` for one of routed experts, and drops
            LoRA on shared experts and dense layers. Named as bare parameters they are left alone, and their factors
            are called the same.

    Raises:
        CheckpointError: the experts of a layer do not all have LoRA of one rank and scaling.
    """
    stacks = _stacks(adapter)
    in_stacks = {name for parts in stacks.values() for part in parts for name in part}
    kept = {name: pair for name, pair in adapter.pairs.items() if name not in in_stacks}
    steps = [_copy(adapter, key) for pair in kept.values() for key in (pair.a, pair.b)]
    steps += [_copy(adapter, key) for key in adapter.saved.values()]
    bare = {name for name in kept if to == "peft-native" and name.endswith(REWRITTEN)} | set(adapter.parameters)
    settings: Settings = {
        name if pair.experts or name not in bare else f"{name}.weight": (pair.rank, pair.scaling)
        for name, pair in kept.items()
    }
    with Reader(adapter) as reader:
        for name, parts in stacks.items():
            experts = name.rpartition(".")[0]
            both = name.endswith("gate_up_proj") and f"{experts}.down_proj" in stacks
            module = f"{experts}.base_layer" if both else experts
            pairs = [[adapter.pairs[member] for member in part] for part in parts]
            is_shared = all(
                same_bytes(reader, reader, one.a, two.a) for one, two in zip(pairs[0], pairs[-1], strict=True)
            )
            rank = pairs[0][0].rank if is_shared else sum(part[0].rank for part in pairs)
            settings[name] = (rank, pairs[0][0].scaling)
            steps += _stacked_steps(adapter, module, pairs, rank, is_shared)
    return _plan(adapter, to, steps, settings, bool(adapter.config_json.get("use_rslora")))


def _stacked_steps(
    adapter: LoraAdapter, module: str, pairs: list[list[Pair]], rank: int, is_shared: bool
) -> Iterable[Step]:
    columns = adapter.entries[pairs[0][0].a].shape[1]
    rows = sum(adapter.entries[part[0].b].shape[0] for part in pairs)
    experts, dtype = len(pairs[0]), adapter.dtype(pairs[0][0].a)
    for factor, shape in (("A", (experts * rank, columns)), ("B", (rows, rank * experts))):
        parts = pairs[:1] if factor == "A" and is_shared else pairs
        keys = tuple(pair.a if factor == "A" else pair.b for part in parts for pair in part)
        yield Step(Stack(factor, len(pairs), is_shared), keys, (TensorSpec(_key(module, factor), dtype, shape),))


def _stacks(adapter: LoraAdapter) -> dict[str, list[list[str]]]:
    """For every stacked weight the modules that make it: those of all experts, one projection after the other."""
    found: dict[str, dict[str, dict[int, str]]] = {}
    for name in adapter.pairs:
        if member := EXPERT.fullmatch(name):
            projections = found.setdefault(member["experts"], {})
            projections.setdefault(member["projection"], {})[int(member["expert"])] = name
    path, stacks = adapter.folder / ADAPTER_WEIGHTS, {}
    for experts, projections in found.items():
        for stacked, parts in _PROJECTIONS.items():
            name = experts.removesuffix(".mlp.experts") + stacked
            if not any(part in projections for part in parts):
                continue
            for part in parts:
                _check_part(path, experts, part, projections)
            stacks[name] = [[projections[part][e] for e in sorted(projections[part])] for part in parts]
            _check_stack(adapter, name, stacks[name])
    return stacks


def _check_part(path, experts: str, part: str, projections: dict[str, dict[int, str]]) -> None:
    count = max(max(found) for found in projections.values()) + 1
    missing = next((e for e in range(count) if e not in projections.get(part, {})), None)
    if missing is not None:
        raise CheckpointError(
            f"{path}: {experts}.{missing}.{part}_proj has no LoRA, others of its layer have; stacked, all do"
        )


def _check_stack(adapter: LoraAdapter, name: str, parts: list[list[str]]) -> None:
    for part in parts:
        for member in part:
            pair, first, usual = adapter.pairs[member], adapter.pairs[part[0]], adapter.pairs[parts[0][0]]
            shapes = [adapter.entries[key].shape for key in (pair.a, pair.b)]
            expected = [adapter.entries[first.a].shape, adapter.entries[first.b].shape]
            same_input = shapes[0][1] == adapter.entries[usual.a].shape[1]
            dtypes = {adapter.dtype(key) for key in (pair.a, pair.b, usual.a)}
            if shapes != expected or not same_input or pair.scaling != usual.scaling or len(dtypes) > 1:
                raise CheckpointError(
                    f"{adapter.folder / ADAPTER_WEIGHTS}: {member} differs in rank, scaling, shape or dtype from the "
                    f"others that would be stacked with it to {name}"
                )


def _modules(name: str, pair: Pair) -> list[str]:
    """The modules of a stacked weight, expert after expert; any other module itself."""
    if not pair.experts:
        return [name]
    stacked = next(ending for ending in STACKED if name.endswith(ending))
    experts = name.rpartition(".")[0]
    return [f"{experts}.{e}.{part}_proj" for e in range(pair.experts) for part in _PROJECTIONS[stacked]]


def _plan(adapter: LoraAdapter, to: str, steps: list[Step], settings: Settings, use_rslora: bool) -> Plan:
    rank, scaling = _usual(settings.values())
    alpha = _alpha(rank, scaling, use_rslora)
    alphas = {name: _alpha(*setting, use_rslora) for name, setting in settings.items()}
    is_parameter = {name: name.endswith((*STACKED, ".weight")) for name in settings}
    config_json: dict[str, Any] = {
        **adapter.config_json,
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": use_rslora,
        "rank_pattern": {name: own for name, (own, _) in settings.items() if own != rank},
        "alpha_pattern": {name: own for name, own in alphas.items() if own != alpha},
        "target_modules": sorted(name for name in settings if not is_parameter[name]),
        "target_parameters": sorted(name for name in settings if is_parameter[name]) or None,
        **dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern")),
        # Factors that are read from a file start no more, and PEFT's layer of stacked weights knows few starts.
        "init_lora_weights": True,
    }
    if config_json["target_parameters"]:
        config_json["lora_dropout"] = 0.0  # PEFT refuses another beside bare parameters
    return Plan(
        adapter,
        to,
        (Shard(ADAPTER_WEIGHTS, tuple(steps)),),
        config_json,
        adapter.other_files,
        config_name=ADAPTER_CONFIG,
        with_index=False,
        read_back=open_adapter,
        without_logits="an adapter is no model",
    )


def _copy(adapter: LoraAdapter, key: str) -> Step:
    return Step(Copy(), (key,), (TensorSpec(key, adapter.dtype(key), adapter.entries[key].shape),))


def _key(module: str, factor: str) -> str:
    return f"{ADAPTER_PREFIX}{module}.lora_{factor}.weight"


def _alpha(rank: int, scaling: float, use_rslora: bool) -> float:
    """The `lora_alpha` that gives `scaling`, a whole number where rounding alone keeps it from being one."""
    alpha = scaling * rank**0.5 if use_rslora else scaling * rank
    return round(alpha) if abs(alpha - round(alpha)) < 1e-9 * abs(alpha) else alpha


def _usual(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]
