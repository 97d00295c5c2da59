"""The same adapted model with this package's layer on the routed experts and with PEFT's, and how to compare both."""

import copy

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import tiny_config, tiny_ids, tiny_model

from modeling_deepseek_moe.expert_lora import ParamWrapper, register_expert_lora

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def make_config(**options) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": [], "target_parameters": EXPERTS, **options})


def randomize(model, seed: int) -> None:
    """Adapters that do something: PEFT starts B at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.1, generator=generator)


def base_model():
    """Without multi-token prediction, whose experts no loss would train."""
    return tiny_model(tiny_config("v3", num_nextn_predict_layers=0))


def pair(model=None, **options) -> tuple[PeftModel, PeftModel]:
    """The same adapted model twice: with the layer of this package and with PEFT's."""
    model = model or base_model()
    stock = get_peft_model(copy.deepcopy(model), make_config(**options))
    ours = get_peft_model(model, register_expert_lora(make_config(**options), model))
    for adapted in (ours, stock):
        randomize(adapted, seed=1)
    return ours.eval(), stock.eval()


def wrappers(model) -> list[ParamWrapper]:
    return [module for module in model.modules() if isinstance(module, ParamWrapper)]


def ids_of(model) -> torch.Tensor:
    return tiny_ids(model.config)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(ids_of(model)).logits


def assert_same(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """float32: the same sums in another order, through three layers; errors go with the largest entry."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def gradients(model) -> dict[str, torch.Tensor]:
    """Of every adapter, and of the embedded tokens, in one training step."""
    model.train()
    embedded = model.get_input_embeddings()(ids_of(model)).detach().requires_grad_()
    model(inputs_embeds=embedded, labels=ids_of(model), use_cache=False).loss.backward()
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.zero_grad()
    return {**found, "embedded": embedded.grad}


def assert_same_gradients(ours, stock) -> None:
    actual, expected = gradients(ours), gradients(stock)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.any(), name
        assert_same(actual[name], gradient)
