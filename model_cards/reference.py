"""Cards of the released models, written from their presets and `released.yaml`.

python -m modeling_deepseek_moe.model_cards.reference [--output FOLDER]
"""

import argparse
import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch
import yaml

from modeling_deepseek_moe import DeepseekMoeConfig
from modeling_deepseek_moe.checkpoint_layout import (
    expected_tensors,
    is_mtp_tensor,
    is_redundant,
    parameter_counts,
)
from modeling_deepseek_moe.families import FAMILIES
from modeling_deepseek_moe.fp8_blocks import SCALE_SUFFIX
from modeling_deepseek_moe.latent_cache import cache_elements
from modeling_deepseek_moe.presets import PRESET_OF_SIBLING, released_json
from modeling_deepseek_moe.quantized.weights import BITS, is_quantized

FOLDER = Path(__file__).with_name("reference")
_TEMPLATE = Path(__file__).with_name("reference.md.jinja")
_DATA = Path(__file__).with_name("released.yaml")
_STORED = {
    "bfloat16": "bfloat16",
    "fp8": "FP8 blocks of 128 x 128, the rest in bfloat16",
    "fp8 matrices": "FP8 with one scale a matrix and scales of activations, the rest in bfloat16",
    "int4": "INT4 with a scale for 32 values in the routed experts, the rest in bfloat16",
}


def released() -> dict[str, dict[str, Any]]:
    """What `released.yaml` says of each card, by the name of its preset."""
    data = yaml.safe_load(_DATA.read_text(encoding="utf-8"))
    return {name: {**card, "paper": data["papers"].get(card.get("paper"))} for name, card in data["cards"].items()}


def reference_card(name: str) -> str:
    """The card of a released model.

    Args:
        name: a key of `released()`.
    """
    card, config = released()[name], DeepseekMoeConfig.preset(name)
    size = _sizes_of_shape(PRESET_OF_SIBLING.get(name, name))  # siblings have the same shapes
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        title=card["title"],
        preset=name,
        repositories=card["repositories"],
        paper=card["paper"],
        figures=card.get("figures", []),
        notes=card.get("notes", []),
        is_fp8=card["published_as"] == "fp8",
        whole=card.get("text_part_of"),
        stored=_STORED[card["published_as"]],
        sentence=f"{size.parameters / 1e9:.1f}B parameters, of which {size.active / 1e9:.1f}B work on a token: "
        f"{config.num_experts_per_tok} of {config.n_routed_experts} routed experts"
        + (f" and {config.n_shared_experts} shared." if config.n_shared_experts else "."),
        facts=_facts(config, size),
        weights=[(form, f"{count / 1e9:,.1f}") for form, count in size.bytes.items()],
        cache=_cache(config),
        loaded=card.get("readable_copy", card["repositories"][0]),
        trained=card.get("readable_copy", card["repositories"][-1]),
        elsewhere=_elsewhere(released_json(name)["model_type"], card.get("text_part_of")),
    )


@dataclass(frozen=True)
class Sizes:
    """What the tensors of a model take.

    Attributes:
        parameters, active: all, and those that work on a token, as `parameter_counts` counts them.
        mtp: parameters of the multi-token layers, without their copies of embedding and head.
        bytes: size of the weights without those layers, by the form they are in.
    """

    parameters: int
    active: int
    mtp: int
    bytes: dict[str, int]


def sizes(config: DeepseekMoeConfig) -> Sizes:
    """Sizes of a model that would be published as FP8 blocks, where its family has these, bfloat16 or NF4."""
    mtp, sizes = 0, {"bfloat16": 0.0, "FP8 blocks": 0.0, "NF4": 0.0}
    for name, (shape, dtype) in expected_tensors(config, fp8=True, stacked=False).items():
        count, is_scale, is_fp8 = math.prod(shape), name.endswith(SCALE_SUFFIX), dtype == torch.float8_e4m3fn
        if is_mtp_tensor(name, config):
            mtp += 0 if is_scale or is_redundant(name) else count
            continue
        sizes["FP8 blocks"] += count * dtype.itemsize
        if not is_scale:
            sizes["bfloat16"] += count * (torch.bfloat16 if is_fp8 else dtype).itemsize
            plain = (torch.bfloat16 if is_fp8 else dtype).itemsize
            sizes["NF4"] += count * (BITS / 8 if is_quantized(name) else plain)
    if config.family is not None and not FAMILIES[config.family].has_fp8_blocks:
        del sizes["FP8 blocks"]
    return Sizes(*parameter_counts(config), mtp, {form: round(count) for form, count in sizes.items()})


@functools.lru_cache
def _sizes_of_shape(preset: str) -> Sizes:
    return sizes(DeepseekMoeConfig.preset(preset))


def write_cards(folder: Path = FOLDER) -> list[Path]:
    """Writes a file for each card; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name in released():
        paths.append(folder / f"{name}.md")
        paths[-1].write_text(reference_card(name), encoding="utf-8")
    return paths


def _facts(config: DeepseekMoeConfig, size: Sizes) -> list[tuple[str, str]]:
    dense, width = config.first_k_dense_replace, config.moe_intermediate_size
    without = "the first" if dense == 1 else f"the first {dense}"
    of_dense = f"; {config.intermediate_size:,} in the MLP of layers without experts" if dense else ""
    rows = [
        ("parameters", f"{size.parameters:,}"),
        ("active for a token", f"{size.active:,}"),
        ("layers", f"{config.num_hidden_layers}, {f'{without} without experts' if dense else 'all with experts'}"),
        ("hidden size", f"{config.hidden_size:,}{of_dense}"),
        ("attention", _attention(config)),
        ("experts", f"{config.n_routed_experts} routed and {config.n_shared_experts} shared, {width:,} wide"),
        ("router", _router(config)),
        ("vocabulary", f"{config.vocab_size:,}"),
        ("positions", _positions(config)),
    ]
    if config.num_nextn_predict_layers:
        layers = config.num_nextn_predict_layers
        rows.append(("multi-token prediction", f"{layers} layer more, {size.mtp:,} parameters"))
    return rows


def _attention(config: DeepseekMoeConfig) -> str:
    heads = config.num_attention_heads
    if config.kv_lora_rank is None:
        groups, rotated = config.num_key_value_heads, config.rotary_dim
        kind = "multi-head" if groups == heads else f"queries in {groups} groups"
        part = f", of which {rotated} are rotated" if rotated < config.head_dim else ""
        return f"{kind}, {heads} heads of {config.head_dim}{part}" + (", normed" if config.use_qk_norm else "")
    queries = f"compressed to {config.q_lora_rank:,}" if config.q_lora_rank else "not compressed"
    return (
        f"MLA, {heads} heads; keys of {config.qk_nope_head_dim} + {config.qk_rope_head_dim} and values of "
        f"{config.v_head_dim} out of a latent of {config.kv_lora_rank}; queries {queries}"
        f"{_indexer(config)}"
    )


def _indexer(config: DeepseekMoeConfig) -> str:
    if config.index_topk is None:
        return ""
    heads, width = config.index_n_heads, config.index_head_dim
    return f"; an indexer of {heads} heads of {width} chooses {config.index_topk:,} tokens"


def _router(config: DeepseekMoeConfig) -> str:
    scores = "sigmoid scores with a selection bias" if config.topk_method == "noaux_tc" else "softmax scores"
    groups = f" out of {config.topk_group} of {config.n_group} groups" if config.n_group > 1 else ""
    scale = config.routed_scaling_factor
    weights = "normalised" if config.norm_topk_prob else "as they are"
    times = f", times {scale:g}" if scale != 1 else ""
    return f"{scores}; the best {config.num_experts_per_tok}{groups}; weights {weights}{times}"


def _positions(config: DeepseekMoeConfig) -> str:
    rope, most = config.rope_parameters, f"{config.max_position_embeddings:,}"
    if rope["rope_type"] != "yarn":
        return f"{most}; theta {rope['rope_theta']:,.0f}"
    original = rope["original_max_position_embeddings"]
    return f"{most}, by YaRN of factor {rope['factor']:g} from {original:,}; theta {rope['rope_theta']:,.0f}"


def _cache(config: DeepseekMoeConfig) -> str:
    elements = cache_elements(config)
    full = 2 * elements * config.max_position_embeddings
    return (
        f"The cache holds {elements:,} numbers a token: {2 * elements:,} bytes in bfloat16, {full / 1e9:.1f} GB for "
        f"{config.max_position_embeddings:,} tokens."
    )


def _elsewhere(model_type: str, whole: str | None) -> str:
    if whole:
        return f"For the whole of it transformers has a class, `{whole}`, which `AutoModelForImageTextToText` takes."
    if model_type in ("deepseek_v2", "deepseek_v3") or FAMILIES[model_type].keeps_type:
        return f"transformers has a class of its own for the type `{model_type}`, which `AutoModelForCausalLM` takes."
    unknown = f"transformers does not know the type `{model_type}`."
    return f"{unknown} Import this package, and `AutoModelForCausalLM` takes it."


def main() -> None:
    """Command line of `python -m modeling_deepseek_moe.model_cards.reference`."""
    parser = argparse.ArgumentParser(description="Writes the cards of the released models.")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder for them")
    for path in write_cards(parser.parse_args().output):
        print(path)


if __name__ == "__main__":
    main()
