"""The cards of the released models: in step with presets and data, and with the figures of FACTS."""

import re

import pytest
import torch
from huggingface_hub import ModelCard
from places import ROOT
from tiny import tiny_config, tiny_model

from modeling_deepseek_moe import DeepseekMoeConfig
from modeling_deepseek_moe.checkpoint_layout import is_mtp_tensor
from modeling_deepseek_moe.model_cards import reference
from modeling_deepseek_moe.model_cards.metadata import problems
from modeling_deepseek_moe.presets import PRESET_OF_SIBLING, PRESETS

FACTS = (ROOT / "FACTS.md").read_text(encoding="utf-8")
# FACTS 7.3 names models in short.
NAME_IN_FACTS = {
    "deepseek-moe-16b": "moe-16b",
    "deepseek-v2-lite": "V2-Lite",
    "deepseek-v2": "V2",
    "deepseek-v3": "V3 (bias included)",
    "moonlight-16b-a3b": "Moonlight (bias included)",
    "kimi-k2": "Kimi-K2 (bias included)",
    "kimi-k2.5": "Kimi-K2 (bias included)",
    "glm-4.7-flash": "GLM-4.7-Flash",
    "glm-4.5-air": "GLM-4.5-Air",
    "glm-4.5": "GLM-4.5",
    "sarvam-105b": "Sarvam 105B",
    "mistral-small-4": "Mistral Small 4 (text)",
    "deepseek-v3.2": "DeepSeek-V3.2",
}


@pytest.fixture(scope="module")
def cards(tmp_path_factory) -> dict[str, str]:
    """All cards, written anew."""
    paths = reference.write_cards(tmp_path_factory.mktemp("cards"))
    return {path.stem: path.read_text(encoding="utf-8") for path in paths}


def test_the_cards_of_the_repository_are_what_presets_and_data_make(cards):
    stored = {path.stem: path.read_text(encoding="utf-8") for path in reference.FOLDER.glob("*.md")}
    assert stored.keys() == cards.keys()
    outdated = [name for name in cards if stored[name] != cards[name]]
    assert not outdated, "python -m modeling_deepseek_moe.model_cards.reference"


@pytest.mark.parametrize("name", NAME_IN_FACTS)
def test_parameters_are_those_of_facts(cards, name):
    row = re.search(rf"^\| {re.escape(NAME_IN_FACTS[name])} \| ([\d,]+) \| ([\d,]+) \|", FACTS, re.M)
    assert f"| parameters | {row[1]} |" in cards[name]
    assert f"| active for a token | {row[2]} |" in cards[name]


def test_the_cache_is_that_of_facts():
    golden = re.search(r"Golden numbers: V2 ([\d,]+); V2-Lite ([\d,]+); V3 ([\d,]+) elements per token", FACTS)
    for name, elements in zip(("deepseek-v2", "deepseek-v2-lite", "deepseek-v3"), golden.groups(), strict=True):
        assert f"{reference.cache_elements(DeepseekMoeConfig.preset(name)):,}" == elements
    # Keys and values of 16 heads of 128 in 28 layers.
    assert reference.cache_elements(DeepseekMoeConfig.preset("deepseek-moe-16b")) == 2 * 16 * 128 * 28


@pytest.mark.parametrize("lineage", ["v1", "v2", "v3"])
def test_bytes_and_active_parameters_are_those_of_a_model_in_memory(lineage):
    config = tiny_config(lineage, dtype="bfloat16")
    sizes, model = reference.sizes(config), tiny_model(config).to(torch.bfloat16)
    tensors = {name: value for name, value in model.state_dict().items() if not is_mtp_tensor(name, config)}
    assert sizes.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert sizes.bytes["bfloat16"] == sum(tensor.nbytes for tensor in tensors.values())
    # Experts that a token does not choose, and the selection bias, are all that is not active.
    idle = sum(
        t.numel() * (1 - config.num_experts_per_tok / config.n_routed_experts)
        for n, t in tensors.items()
        if ".experts." in n
    )
    idle += sum(t.numel() for n, t in tensors.items() if n.endswith("e_score_correction_bias"))
    assert sizes.active == sizes.parameters - idle
    assert sizes.bytes["NF4"] < sizes.bytes["FP8 blocks"] < sizes.bytes["bfloat16"]


def test_every_preset_and_its_siblings_are_on_a_card_of_their_own_shape():
    cards = reference.released()
    covered = set(cards)
    for name, card in cards.items():
        for repository in card["repositories"]:
            sibling = repository.rpartition("/")[2].lower()
            assert PRESET_OF_SIBLING.get(sibling, sibling) == PRESET_OF_SIBLING.get(name, name)
            covered.add(sibling)
    assert covered == PRESETS.keys() | PRESET_OF_SIBLING.keys()


def test_a_text_part_is_loaded_as_one_and_fp8_blocks_are_counted_where_there_are_any(cards):
    wrapped = {name for name, card in reference.released().items() if "text_part_of" in card}
    assert wrapped == {"kimi-k2.5", "mistral-small-4"}
    for name, text in cards.items():
        assert ("text_only=True" in text) == ("text_only=true" in text) == (name in wrapped)
        assert ("| FP8 blocks |" in text) == (name != "mistral-small-4")


def test_every_number_of_a_figure_stands_in_the_section_of_facts_that_it_names():
    parts = re.split(r"^#{2,3} (\d+(?:\.\d+)?)", FACTS, flags=re.M)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    for name, card in reference.released().items():
        for group in card.get("figures", []):
            text = sections[re.search(r"FACTS (\d+\.\d+)", group["source"])[1]].replace(",", "")
            for value in group["rows"].values():
                for number in re.findall(r"\d+(?:\.\d+)?", str(value).replace(",", "")):
                    assert re.search(rf"(?<![\d.]){re.escape(number)}(?![\d.]*\d)", text), f"{name}: {value}"


def test_the_header_is_one_that_the_hub_takes(cards):
    for text in cards.values():
        assert problems(ModelCard(text).data.to_dict()) == []
        assert "None" not in text and "{" not in text.replace("{ ", "")
