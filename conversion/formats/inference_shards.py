"""DeepSeek's own model-parallel files: what they and the tensors in them are called, and which slice a rank has.

Source: FACTS 9. Rank r of N has everything it computes with in `model{r}-mp{N}.safetensors`: its slice of the
projections along heads or width, its routed experts whole, and copies of the rest. The program that reads them knows
no multi-token prediction, so MTP modules lie beside them under their published names, in a file that it does not open.
"""

import re

from modeling_deepseek_moe.fp8_blocks import SCALE_SUFFIX
from modeling_deepseek_moe.parts import expert_of, layer_of

MTP_NAME = "mtp.safetensors"
# Not config.json: that one is the published model's, which tokenizers are looked up by.
ARGS_NAME = "model_args.json"

# Module -> its name there, and the dimension along which ranks share it; None for copies.
_MODULES = {
    "embed_tokens": ("embed", 0),
    "input_layernorm": ("attn_norm", None),
    "post_attention_layernorm": ("ffn_norm", None),
    "q_proj": ("wq", 0),
    "q_a_proj": ("wq_a", None),
    "q_a_layernorm": ("q_norm", None),
    "q_b_proj": ("wq_b", 0),
    "kv_a_proj_with_mqa": ("wkv_a", None),
    "kv_a_layernorm": ("kv_norm", None),
    "kv_b_proj": ("wkv_b", 0),
    "o_proj": ("wo", 1),
    "gate": ("gate", None),
    "gate_proj": ("w1", 0),
    "up_proj": ("w3", 0),
    "down_proj": ("w2", 1),
    "norm": ("norm", None),
    "lm_head": ("head", 0),
}
_PARTS = {"self_attn": "attn", "mlp": "ffn"}
_LEAVES = {"weight": "weight", f"weight{SCALE_SUFFIX}": "scale", "e_score_correction_bias": "bias"}
_MODULE_OF = {name: module for module, (name, _) in _MODULES.items()}
_PART_OF = {name: part for part, name in _PARTS.items()}
_LEAF_OF = {name: leaf for leaf, name in _LEAVES.items()}
_RANK_FILE = re.compile(r"model(0|[1-9][0-9]{0,5})-mp([1-9][0-9]{0,5})\.safetensors")


def rank_file(rank: int, mp: int) -> str:
    """The file of rank `rank` of `mp`."""
    return f"model{rank}-mp{mp}.safetensors"


def rank_of_file(file: str) -> tuple[int, int] | None:
    """Rank and number of ranks, if that is what a file is called."""
    found = _RANK_FILE.fullmatch(file)
    return (int(found[1]), int(found[2])) if found else None


def rank_key(file: str, name: str) -> str:
    """What tensor `name` of a rank's file is called among those of all files; others keep their name."""
    found = rank_of_file(file)
    return f"rank{found[0]}:{name}" if found else name


def inference_name(name: str) -> str:
    """The name there of a tensor published as `name`."""
    *parts, module, leaf = name.removeprefix("model.").split(".")
    return ".".join([*(_PARTS.get(part, part) for part in parts), _MODULES[module][0], _LEAVES[leaf]])


def published_name(name: str) -> str | None:
    """The other way round; None if there is no such tensor."""
    parts = name.split(".")
    if len(parts) < 2 or parts[-2] not in _MODULE_OF or parts[-1] not in _LEAF_OF:
        return None
    module = _MODULE_OF[parts[-2]]
    published = [*(_PART_OF.get(part, part) for part in parts[:-2]), module, _LEAF_OF[parts[-1]]]
    if len(parts) == 2:
        return ".".join(published if module == "lm_head" else ["model", *published])
    result = ".".join(["model", *published])
    is_layer = result.startswith("model.layers.") and layer_of(result) is not None
    return result if is_layer and inference_name(result) == name else None


def sliced_dim(name: str) -> int | None:
    """The dimension along which ranks share the tensor published as `name`; None if each has it whole."""
    return None if expert_of(name) is not None else _MODULES[name.split(".")[-2]][1]
