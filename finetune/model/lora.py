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
import re
import warnings
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from modeling_deepseek_moe.parts import MODULES, PARAMETERS, WORDS

from ..recipe.checks import check_words

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

_LAYER = re.compile(r"(?:.*\.)?(?P<name>layers\.(?P<layer>\d+)\.(?P<leaf>.+))")
_NEEDS_LINEAR = ("lora_dropout", "use_dora", "lora_bias", "fan_in_fan_out")
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
    model: "PreTrainedModel", targets: Iterable[str], r: int = 16, lora_alpha: int = 32, **peft_options: Any
) -> "LoraConfig":
    """A `peft.LoraConfig` that puts adapters on the named parts of `model`.

    Args:
        model: a DeepseekMoe model, base or with a head.
        targets: words of the table above.
        r, lora_alpha: rank and scale, as in PEFT.
        **peft_options: further fields of `peft.LoraConfig`. `layers_to_transform` also restricts stacked weights,
            which PEFT alone would not.

    Raises:
        ValueError: an unknown word, one that matches nothing in this model, an option that stacked weights cannot
            have, or a model of another class.
    """
    from peft import LoraConfig

    from modeling_deepseek_moe.expert_lora import register_expert_lora

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
    found = _find(model, peft_options.pop("layers_to_transform", None))
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
    task = next(task for ending, task in _TASKS.items() if type(model).__name__.endswith(ending))
    config = LoraConfig(
        r=r,
        lora_alpha=lora_alpha,
        target_modules=_pattern([name for word in words if word in MODULES for name in found[word]]),
        target_parameters=[name for word in stacked for name in found[word]],
        **{"task_type": task, **peft_options},
    )
    return register_expert_lora(config, model) if "routed_experts" in stacked else config


def _find(model: "PreTrainedModel", layers: int | Iterable[int] | None) -> dict[str, list[str]]:
    """Names, from `layers.` on, of the modules and parameters that each word means."""
    config = model.config
    depth = config.num_hidden_layers + (config.num_nextn_predict_layers if config.mtp_loss_weight else 0)
    allowed = set(range(depth)) if layers is None else {layers} if isinstance(layers, int) else set(layers)
    if outside := sorted(allowed - set(range(depth))):
        raise ValueError(f"layers_to_transform names layer {outside[0]}: adapters can sit on layers 0 to {depth - 1}")
    found: dict[str, list[str]] = {word: [] for word in WORDS}
    for patterns, names in (
        (MODULES, (name for name, _ in model.named_modules())),
        (PARAMETERS, (name for name, _ in model.named_parameters())),
    ):
        for name in names:
            part = _LAYER.fullmatch(name)
            if part is None or int(part["layer"]) not in allowed:
                continue
            for word, pattern in patterns.items():
                if pattern.fullmatch(part["leaf"]):
                    found[word].append(part["name"])
    return found


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
