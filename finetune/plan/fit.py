"""`deepseek-moe plan`: the memory that a recipe needs, where it fits, and what to change where it does not.

The peak comes from `memory`; on top of it a GPU needs room for CUDA itself and for the gaps between tensors, which are
estimates and listed as such. Sharded over several GPUs (FSDP, ZeRO-3) each holds its part of weights, gradients and
optimizer state, and all of the layers that compute at the moment; activations are not shared out.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modeling_deepseek_moe import CheckpointError, DeepseekMoeConfig
from modeling_deepseek_moe.presets import PRESET_OF_SIBLING, PRESETS, released_json

from ..errors import UserError, first_line, nearest
from ..model.checks import check_configs
from ..recipe.load import SHIPPED, load_recipe, make_recipe, recipe_file
from ..recipe.schema import Recipe
from ..runs.named import named
from ..runs.results import is_run
from .memory import Memory, MemoryPlan
from .model import Parameter

GIB = 2**30
CUDA_CONTEXT = int(0.8 * GIB)
FRAGMENTATION = 0.1
GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_UNITS = {"M": 2**20, "G": GIB, "T": 2**40}
MOST_ROWS, MOST_TOKENS = 4096, 2**20
LEAST_TOKENS = 128  # of rows that are still worth training on


@dataclass(frozen=True)
class Need:
    """Bytes that one GPU needs, by what for.

    Attributes:
        parts: the peak of a step by what takes it.
        estimates: what no formula knows, by rules of thumb: CUDA's own memory and its libraries', and a tenth of what
            comes and goes for gaps between tensors.
        host: what the whole model takes in the machine's memory, where weights and states are offloaded to it.
    """

    parts: dict[str, int]
    estimates: dict[str, int]
    host: int = 0

    @property
    def total(self) -> int:
        """Bytes of parts and estimates together."""
        return sum(self.parts.values()) + sum(self.estimates.values())


@dataclass(frozen=True)
class Advice:
    """Changes to the recipe or the machine, in words that the command line takes, and what a GPU then needs."""

    changes: tuple[str, ...]
    need: int
    fits: bool


def find_config(model: str) -> DeepseekMoeConfig:
    """The config of a released model by its name or its Hub name, of a folder or a run, or of another one on the Hub.

    Raises:
        UserError: there is none, or it is of a model that this package does not have.
    """
    if is_run(Path(model)):
        return find_config(named(model).model)
    path = Path(model).expanduser()
    if not path.exists() and (released := released_json(model.rpartition("/")[2].lower())) is not None:
        return DeepseekMoeConfig.from_dict(released)
    if path.is_file() or (path.is_dir() and not (path / "config.json").is_file()):
        raise UserError(f"{model} is no model: give a folder with a config.json, or a name")
    if not path.exists() and (model.count("/") != 1 or model.startswith((".", "/", "~"))):
        known = [*PRESETS, *PRESET_OF_SIBLING]
        raise UserError(
            f"model {model!r} is no folder, no Hub name (USER/NAME) and no released model: did you mean "
            f"{nearest(model.lower(), known)!r}?"
        )
    try:
        check_configs(os.fspath(path) if path.is_dir() else model)
        config = DeepseekMoeConfig.from_pretrained(path if path.is_dir() else model)
    except (OSError, ValueError, CheckpointError, KeyError, TypeError) as error:
        raise UserError(
            f"cannot read the config of model {model!r}: {first_line(error)}; give a folder with a config.json, a Hub "
            "name, or the name of a released model such as deepseek-v2-lite"
        ) from error
    return config


def plan_recipe(name: str, model: str, overrides: list[str]) -> Recipe:
    """A recipe for this model; data and output folder need not be known."""
    if model in SHIPPED and not recipe_file(name).is_file():
        raise UserError(f"{model} is a recipe: name the model first (`deepseek-moe plan {name} {model}`)")
    unknown = [f"{key}=unknown" for key in ("data", "output_dir")]
    return load_recipe(name, [*unknown, *overrides, f"model={model}"])


def read_memory(text: str) -> int:
    """Bytes of "24GB" or "24GiB"; both mean 2**30, as makers of GPUs count.

    Raises:
        UserError: no number with a unit, or nothing.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([MGT])i?B\s*", text, re.IGNORECASE)
    if not found or float(found[1]) == 0:
        raise UserError(f"--gpu-memory is {text!r}: give a number above 0 with its unit, such as 24GB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def need_of(plan: MemoryPlan, memory: Memory, gpus: int = 1, offload: bool = False) -> Need:
    """What each of `gpus` GPUs needs for a step.

    Args:
        plan: what model and recipe need.
        memory: what the micro-batch needs.
        gpus: how many share weights, gradients and optimizer state; not where weights are in four bits, which
            FSDP and ZeRO cannot cut.
        offload: weights, gradients and optimizer state lie in the machine's memory but for the layers that compute.
    """
    parts = {f"weights: {name}": size for name, size in memory.weights.items()}
    parts |= {"optimizer state": memory.optimizer, "gradients": memory.gradients}
    host = 0
    if can_shard(plan) and (gpus > 1 or offload):
        host = (memory.static + memory.all_gradients) if offload else 0
        parts = {} if offload else {name: -(-size // gpus) for name, size in parts.items()}
        parts["layers gathered to compute"] = gathered(plan.parameters)
    parts |= {"activations": memory.activations, "temporaries": memory.temporaries}
    # Weights and states are allocated once; the rest comes and goes in pieces of many sizes.
    moving = memory.gradients + memory.activations + memory.temporaries
    estimates = {
        "CUDA itself (estimate)": CUDA_CONTEXT,
        "gaps between tensors (estimate)": int(FRAGMENTATION * moving),
    }
    return Need({name: size for name, size in parts.items() if size}, estimates, host)


def can_shard(plan: MemoryPlan) -> bool:
    """Whether FSDP or ZeRO can cut the weights."""
    return plan.recipe.quantization is None


def gathered(parameters: Iterable[Parameter]) -> int:
    """Whole weights that a sharded step holds: embedding, head and norms, the layer that computes and its
    gradients, and the next one."""
    root, of_layer, of_gradients = 0, {}, {}
    for parameter in parameters:
        one = parameter.nbytes // parameter.layers
        _, inside, rest = parameter.name.partition(".layers.")
        if not inside:
            root += one
            continue
        layer = rest.partition(".")[0]
        of_layer[layer] = of_layer.get(layer, 0) + one
        of_gradients[layer] = of_gradients.get(layer, 0) + one * parameter.is_trained
    return root + 2 * max(of_layer.values(), default=0) + max(of_gradients.values(), default=0)


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that fits, 0 if 1 does not; what fits, fits with less."""
    if not fits(1):
        return 0
    good, bad = 1, 2
    while bad <= most and fits(bad):
        good, bad = bad, 2 * bad
    bad = min(bad, most + 1)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def changed(recipe: Recipe, **values: Any) -> Recipe:
    """The recipe with other values; keys of sections with `__` in place of the dot.

    Raises:
        RecipeError: the recipe would not be one.
    """
    fields = dataclasses.asdict(recipe)
    for key, value in values.items():
        section, _, name = key.partition("__")
        if name:
            fields[section][name] = value
        else:
            fields[key] = value
    return make_recipe(fields)


def smaller_recipes(recipe: Recipe, rows: int) -> list[tuple[str, dict[str, Any]]]:
    """Changes that save memory, the least costly first, each as words of the command line and as values."""
    steps = recipe.training.get("gradient_accumulation_steps") or 1
    options: list[tuple[str, dict[str, Any]]] = []
    if not recipe.gradient_checkpointing:
        options.append(("gradient_checkpointing=true", {"gradient_checkpointing": True}))
    if rows > 1:
        words = f"training.per_device_train_batch_size=1 training.gradient_accumulation_steps={rows * steps}"
        values = {"training__per_device_train_batch_size": 1, "training__gradient_accumulation_steps": rows * steps}
        options.append((words, values))
    if not recipe.lora and not recipe.esft:
        options.append(("training.optim=paged_adamw_8bit", {"training__optim": "paged_adamw_8bit"}))
    if recipe.lora and recipe.quantization is None and not recipe.merge and not recipe.bias_update_speed:
        options.append(("quantization=nf4", {"quantization": "nf4"}))
    targets = recipe.lora.get("targets", [])
    if "all" in targets or "routed_experts" in targets:
        words = ["attention", "shared_experts"]
        options.append(("lora.targets=[attention,shared_experts]", {"lora__targets": words}))
    return options


def advise(config: DeepseekMoeConfig, recipe: Recipe, available: int, gpus: int) -> list[Advice]:
    """What to change so that a step fits: more and more changes to the recipe until it does, then more GPUs, then
    offloading; and what each of them gives alone.

    Raises:
        RecipeError: as `memory.MemoryPlan`.
    """
    plan = MemoryPlan(config, recipe)
    found, together, words = [], recipe, []
    options = smaller_recipes(recipe, plan.rows)
    for word, values in options:
        together, words = changed(together, **values), [*words, word]
        smaller = MemoryPlan(config, together)
        need = need_of(smaller, smaller.memory(), gpus).total
        found.append(Advice(tuple(words), need, need <= available))
        if need <= available:
            break
    shorter = MemoryPlan(config, together)

    def need_at(length: int) -> int:
        return need_of(shorter, shorter.memory(length=length), gpus).total

    if not (found and found[-1].fits):
        length = largest(lambda each: need_at(each) <= available, MOST_TOKENS)
        if length >= LEAST_TOKENS:
            found.append(Advice((*words, f"max_length={length}"), need_at(length), True))
    if can_shard(plan):
        # More GPUs spare the weights, but not the activations: then with the changes that spare these.
        sparing = [(word, values) for word, values in options if not {"quantization", "lora__targets"} & values.keys()]
        spared = recipe
        for count in range(len(sparing) + 1):
            if sharded := _sharded(MemoryPlan(config, spared), [word for word, _ in sparing[:count]], available, gpus):
                found.append(sharded)
                break
            spared = changed(spared, **(sparing[count][1] if count < len(sparing) else {}))
        offloaded = need_of(plan, plan.memory(), gpus, offload=True)
        word = f"weights and optimizer offloaded by ZeRO-3: {offloaded.host / GIB:.0f} GiB of the machine's memory"
        found.append(Advice((word,), offloaded.total, offloaded.total <= available))
    return found


def _sharded(plan: MemoryPlan, words: list[str], available: int, gpus: int) -> Advice | None:
    """The fewest GPUs, more than `gpus`, over which a step fits."""
    memory = plan.memory()
    for count in (count for count in GPUS if count > gpus):
        need = need_of(plan, memory, count).total
        if need <= available:
            return Advice((*words, f"--gpus {count}, sharded by FSDP or ZeRO-3"), need, True)
    return None
