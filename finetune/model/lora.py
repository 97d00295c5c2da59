"""LoRA in words: which parts of a DeepSeekMoE model get adapters.

| word | adapted |
|---|---|
| `attention` | every projection of self-attention |
| `shared_experts` | gate, up and down projection of the shared experts |
| `routed_experts` | both stacked weights of the routed experts, a factor pair for each expert |
| `dense_mlp` | gate, up and down projection of the layers without experts |
| `router` | the router's weight |
| `all` | whatever of these the model has |

Linear modules become PEFT `target_modules`, stacked and bare weights `target_parameters`, each naming exactly the
chosen layers. Layers behind `num_hidden_layers` (multi-token prediction) are chosen only if a loss trains them.
"""

import contextlib
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from modeling_deepseek_moe.parts import MODULES, PARAMETERS, WORDS

from ..recipe.checks import check_words
from ..recipe.sections import DEFAULTS

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

_LAYER = re.compile(r"(?:.*\.)?(?P<name>layers\.(?P<layer>\d+)\.(?P<leaf>.+))")
_NEEDS_LINEAR = ("lora_dropout", "use_dora", "lora_bias", "fan_in_fan_out", "velora_config", "kasa_config")
_NEEDS_LINEAR += ("monteclora_config", "arrow_config", "use_bdlora", "alora_invocation_tokens")
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "Model": "FEATURE_EXTRACTION",
}


@contextlib.contextmanager
def known_warnings() -> Iterator[None]:
    """Keeps PEFT 0.21 quiet about reading a flag by the name that transformers 5.23 calls deprecated."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def lora_config(
    model: "PreTrainedModel",
    targets: Iterable[str],
    r: int = DEFAULTS["lora"]["r"],
    lora_alpha: int = DEFAULTS["lora"]["lora_alpha"],
    **peft_options: Any,
) -> "LoraConfig":
    """A `peft.LoraConfig` that puts adapters on the named parts of `model`.

    Args:
        model: a DeepseekMoe model, base or with a head.
        targets: words of the table above.
        r, lora_alpha: rank and scale, as in PEFT.
        **peft_options: further fields of `peft.LoraConfig`. `layers_to_transform` also restricts stacked weights,
            which PEFT alone would not. `init_lora_weights` of stacked weights is one of those that
            `modeling_deepseek_moe.expert_lora_start` has; where it changes the base weights, save the adapter by
            `save_plain_lora` of that module.

    Raises:
        ValueError: an unknown word, one that matches nothing in this model, an option that stacked weights cannot
            have, options that do not go together, a model of another class, or one that tensor parallelism cut up.
    """
    from peft import LoraConfig

    from modeling_deepseek_moe.expert_lora import register_expert_lora
    from modeling_deepseek_moe.expert_lora_start import changes_base, check_start
    from modeling_deepseek_moe.parallel_adapters import fit_to_spread

    if isinstance(targets, str):
        targets = [targets]
    targets = list(targets)
    check_words(targets)
    if not targets:
        raise ValueError(f"targets is empty: name at least one of {', '.join(WORDS)}, all")
    if model.config.model_type != "deepseek_moe":
        raise ValueError(
            f"a model of type {model.config.model_type!r} cannot be adapted by words, because PEFT rewrites its "
            "targets: load it with DeepseekMoeForCausalLM.from_pretrained"
        )
    replication = peft_options.get("layer_replication")
    found = _find(model, peft_options.pop("layers_to_transform", None), replication)
    words = [word for word in WORDS if word in targets or "all" in targets]
    for word in words:
        if not found[word] and word in targets:
            has = ", ".join(known for known in WORDS if found[known])
            raise ValueError(f"{word!r} matches nothing in this model (it has {has}): leave the word out")
    stacked = [word for word in words if word in PARAMETERS and found[word]]
    for option in _NEEDS_LINEAR:
        if stacked and peft_options.get(option):
            raise ValueError(
                f"{option}={peft_options[option]} does not work with {', '.join(stacked)}, which are not linear "
                f"modules: leave {option} out, or leave these words out"
            )
    start = peft_options.get("init_lora_weights")
    if stacked:
        check_start(start, ", ".join(stacked))
    if changes_base(start):
        for reason, is_so in (
            ("its weights are quantised", getattr(model, "is_quantized", False)),
            ("layer_replication shares them", replication),
        ):
            if is_so:
                raise ValueError(
                    f"init_lora_weights={start!r} changes the base weights, and {reason}: leave init_lora_weights out"
                )
    task = next(task for ending, task in _TASKS.items() if type(model).__name__.endswith(ending))
    config = LoraConfig(
        r=r,
        lora_alpha=lora_alpha,
        target_modules=_pattern([name for word in words if word in MODULES for name in found[word]]),
        target_parameters=[name for word in stacked for name in found[word]],
        **{"task_type": task, **peft_options},
    )
    fit_to_spread(config, model)
    return register_expert_lora(config, model) if "routed_experts" in stacked else config


def factors_taken_from_base(model: "PreTrainedModel | PeftModel") -> "dict[str, torch.Tensor] | None":
    """Copies of the adapters of a model that was not trained yet, if their start changed the base weights.

    `save_adapters` needs them.
    """
    from peft import PeftModel

    from modeling_deepseek_moe.expert_lora_start import changes_base, initial_factors

    is_changed = isinstance(model, PeftModel) and changes_base(model.peft_config["default"].init_lora_weights)
    return initial_factors(model) if is_changed else None


def save_adapters(
    model: "PeftModel",
    folder: str | os.PathLike,
    initial_factors: "dict[str, torch.Tensor] | None",
    state_dict: "dict[str, torch.Tensor]",
) -> None:
    """Saves the adapters as plain LoRA on the base as it was, in PEFT's format.

    Args:
        model: as trained.
        folder: where to.
        initial_factors: what `factors_taken_from_base` gave before the training.
        state_dict: whole weights of what is trained, by their names in the model.
    """
    from modeling_deepseek_moe.expert_lora_start import save_plain_lora

    config = model.peft_config["default"]
    if initial_factors is not None:
        save_plain_lora(model, folder, initial_factors, state_dict)
        return
    if config.init_lora_weights == "orthogonal":  # trained factors start no more, and stock PEFT cannot on stacks
        config.init_lora_weights = True
    model.save_pretrained(folder, state_dict=state_dict)


def _find(
    model: "PreTrainedModel", layers: int | Iterable[int] | None, replication: list[tuple[int, int]] | None = None
) -> dict[str, list[str]]:
    """Names, from `layers.` on, of the modules and parameters that each word means once PEFT has replicated layers."""
    config = model.config
    depth = config.num_hidden_layers + (config.num_nextn_predict_layers if config.mtp_loss_weight else 0)
    sources = list(range(depth)) if not replication else _replicated(config, replication)
    allowed = range(len(sources)) if layers is None else {layers} if isinstance(layers, int) else set(layers)
    if outside := sorted(set(allowed) - set(range(len(sources)))):
        raise ValueError(
            f"layers_to_transform names layer {outside[0]}: adapters can sit on layers 0 to {len(sources) - 1}"
        )
    found: dict[str, list[str]] = {word: [] for word in WORDS}
    for patterns, names in (
        (MODULES, [name for name, _ in model.named_modules()]),
        (PARAMETERS, [name for name, _ in model.named_parameters()]),
    ):
        leaves: dict[int, list[str]] = {}
        for part in filter(None, map(_LAYER.fullmatch, names)):
            leaves.setdefault(int(part["layer"]), []).append(part["leaf"])
        for layer, source in enumerate(sources):
            for leaf in leaves.get(source, []) if layer in allowed else []:
                for word, pattern in patterns.items():
                    if pattern.fullmatch(leaf):
                        found[word].append(f"layers.{layer}.{leaf}")
    return found


def _replicated(config: Any, replication: list[tuple[int, int]]) -> list[int]:
    """Which layer each one will be after PEFT's `layer_replication`, which keeps those it names and no others."""
    depth = config.num_hidden_layers
    for pair in replication:
        if len(pair) != 2 or not 0 <= pair[0] < pair[1] <= depth:
            raise ValueError(
                f"layer_replication names {list(pair)}: it is a list of pairs [first, behind the last] of the model's "
                f"{depth} layers"
            )
    if config.num_nextn_predict_layers and config.mtp_loss_weight:
        raise ValueError(
            f"layer_replication drops the layers of multi-token prediction, which mtp_loss_weight="
            f"{config.mtp_loss_weight} trains: set it to 0"
        )
    return [layer for first, end in replication for layer in range(first, end)]


def _pattern(names: Iterable[str]) -> str | None:
    """One regular expression for exactly these modules: layers that have the same leaves share an alternative."""
    layers_of: dict[str, list[str]] = {}
    for name in names:
        part = _LAYER.fullmatch(name)
        layers_of.setdefault(part["leaf"], []).append(part["layer"])
    leaves_of: dict[str, list[str]] = {}
    for leaf, layers in layers_of.items():
        leaves_of.setdefault("|".join(layers), []).append(re.escape(leaf))
    choices = [rf"(?:{layers})\.(?:{'|'.join(leaves)})" for layers, leaves in leaves_of.items()]
    return rf"(?:.*\.)?layers\.(?:{'|'.join(choices)})" if choices else None
