"""The table of parts, against the modules of a model and the tensors of its checkpoint."""

import pytest
from tiny import tiny_config, tiny_model
from torch import nn

from modeling_deepseek_moe.attention import DeepseekMoeAttention, DeepseekMoeLatentAttention
from modeling_deepseek_moe.checkpoint_layout import expected_tensors
from modeling_deepseek_moe.experts import DeepseekMoeExperts
from modeling_deepseek_moe.moe import DeepseekMoeBlock
from modeling_deepseek_moe.parts import WORDS, expert_of, is_linear_weight, is_stack, layer_of, part_of
from modeling_deepseek_moe.router import DeepseekMoeRouter

PARTS_OF_CLASSES = {
    "attention": (DeepseekMoeAttention, DeepseekMoeLatentAttention),
    "routed_experts": (DeepseekMoeExperts,),
    "router": (DeepseekMoeRouter,),
}


@pytest.mark.parametrize("lineage", ["v1", "v2", "v3"])
def test_a_parameter_is_in_the_part_whose_module_holds_it(lineage):
    model = tiny_model(tiny_config(lineage))
    found = set()
    for name, module in model.named_modules():
        for word, classes in PARTS_OF_CLASSES.items():
            if isinstance(module, classes):
                assert {part_of(f"{name}.{key}") for key, _ in module.named_parameters()} == {word}
                assert part_of(name) == word
        if isinstance(module, DeepseekMoeBlock):
            assert part_of(f"{name}.shared_experts.up_proj.weight") == "shared_experts"
            assert is_stack(f"{name}.experts.gate_up_proj") and not is_stack(f"{name}.experts.0.gate_proj.weight")
    for name, _ in model.named_parameters():
        found.add(part_of(name))
        is_between = any(part in name for part in ("embed_tokens", "lm_head", "layernorm", "model.norm", "eh_proj"))
        assert part_of(name) is not None or is_between or ".enorm." in name or ".hnorm." in name or "_head" in name
    assert found - {None} == set(WORDS)


@pytest.mark.parametrize("lineage", ["v1", "v2", "v3"])
def test_linear_weights_are_those_of_linear_layers_in_attention_and_mlps(lineage):
    model = tiny_model(tiny_config(lineage))
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    outside = {"lm_head.weight", *(name for name in linear if name.endswith("eh_proj.weight"))}
    assert {name for name, _ in model.named_parameters() if is_linear_weight(name)} == linear - outside


def test_published_experts_are_numbered():
    config = tiny_config("v3")
    experts = {(layer_of(name), expert_of(name)) for name in expected_tensors(config) if expert_of(name) is not None}
    depth = config.num_hidden_layers + config.num_nextn_predict_layers
    layers = [layer for layer in range(depth) if config.is_moe_layer(layer)]
    assert experts == {(layer, expert) for layer in layers for expert in range(config.n_routed_experts)}
    assert expert_of("model.layers.1.mlp.shared_experts.up_proj.weight") is None
    assert layer_of("lm_head.weight") is None
