"""Quantisers as their users call them, and what is tried on a model that each of them has made.

`TRIALS` are the columns of the table that tests/benchmarks/quantisers.py prints: each raises where something is wrong
or refused. float32 wherever the library computes in it, so that what is left of a difference is the quantiser's.
"""

import functools
import importlib.util
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    BitsAndBytesConfig,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    HqqConfig,
    PreTrainedModel,
    QuantoConfig,
    TorchAoConfig,
)

from modeling_deepseek_moe import DeepseekMoeForCausalLM
from modeling_deepseek_moe.finetune.model.lora import lora_config
from modeling_deepseek_moe.quantized.loading import NF4Config
from modeling_deepseek_moe.quantized.weights import NF4Weight

# Widths that groups of 64 divide. Every token goes to every expert: a rounding cannot choose another one.
_SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "num_nextn_predict_layers": 0,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 2,
}


def native_folder(folder: Path) -> Path:
    """A checkpoint of transformers' own class, which this package's reads too."""
    torch.manual_seed(0)
    DeepseekV3ForCausalLM(DeepseekV3Config(**_SIZES)).save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Quantiser:
    """A way to load a model with quantised weights."""

    config: Callable[[], Any] | None  # for from_pretrained
    is_quantised: Callable[[nn.Module], bool]  # of a linear layer
    library: str = "torch"
    change: Callable[[PreTrainedModel], PreTrainedModel] | None = None  # after from_pretrained
    rounding: float = 1e-5  # between two products with the same rows among others, relative to the largest logit
    dtype: torch.dtype = torch.float32

    def load(self, model_class: type[PreTrainedModel], folder: Path) -> PreTrainedModel:
        options = {} if self.config is None else {"quantization_config": self.config()}
        model = model_class.from_pretrained(folder, dtype=self.dtype, **options).eval()
        return model if self.change is None else self.change(model)

    @property
    def is_installed(self) -> bool:
        return importlib.util.find_spec(self.library.partition(".")[0]) is not None


def _named(*names: str) -> Callable[[nn.Module], bool]:
    return lambda layer: type(layer).__name__ in names or type(getattr(layer, "weight", None)).__name__ in names


def _dynamic(model: PreTrainedModel) -> PreTrainedModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def _torchao(name: str, **options: Any) -> TorchAoConfig:
    import torchao.quantization

    return TorchAoConfig(getattr(torchao.quantization, name)(**options))


def _four_bits(**options: Any) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, **options)


_BNB4, _BNB8 = _named("Linear4bit"), _named("Linear8bitLt")
_AO = _named("Int8Tensor", "Int4Tensor", "IntxUnpackedToInt8Tensor", "Int4TilePackedTo4dTensor")
_QUANTO = _named("QLinear")
QUANTISERS = {
    "bitsandbytes NF4": Quantiser(functools.partial(_four_bits, bnb_4bit_quant_type="nf4"), _BNB4, "bitsandbytes"),
    "bitsandbytes FP4, scales quantised": Quantiser(
        functools.partial(_four_bits, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True), _BNB4, "bitsandbytes"
    ),
    # Activations are rounded to eight bits row by row, the same row the same way, but not in the absorbed form.
    "bitsandbytes int8": Quantiser(
        functools.partial(BitsAndBytesConfig, load_in_8bit=True), _BNB8, "bitsandbytes", rounding=0.05
    ),
    "torchao int8": Quantiser(functools.partial(_torchao, "Int8WeightOnlyConfig"), _AO, "torchao"),
    "torchao int4": Quantiser(
        functools.partial(_torchao, "IntxWeightOnlyConfig", weight_dtype=torch.int4), _AO, "torchao"
    ),
    "quanto int8": Quantiser(functools.partial(QuantoConfig, weights="int8"), _QUANTO, "optimum.quanto"),
    "quanto int4": Quantiser(functools.partial(QuantoConfig, weights="int4"), _QUANTO, "optimum.quanto"),
    "hqq 4 bits": Quantiser(functools.partial(HqqConfig, nbits=4, group_size=64), _named("HQQLinear"), "hqq"),
    # Activations are rounded on one scale a call, so decoding differs from one pass, with transformers' class too.
    "torch quantize_dynamic": Quantiser(
        None, lambda layer: "quantized" in type(layer).__module__, change=_dynamic, rounding=0.3
    ),
    "NF4Config of this package": Quantiser(
        NF4Config, lambda layer: isinstance(getattr(layer, "weight", None), NF4Weight), "bitsandbytes"
    ),
}


def ids_of(model: PreTrainedModel, rows: int = 2, length: int = 11) -> torch.Tensor:
    return torch.randint(3, model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))


def count(quantiser: Quantiser, model: nn.Module) -> int:
    return sum(quantiser.is_quantised(module) for module in model.modules())


@torch.no_grad()
def logits_of(model: nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=ids_of(model), use_cache=False).logits.float()


def assert_close(actual: torch.Tensor, expected: torch.Tensor, bound: float, what: str) -> None:
    gap, largest = (actual - expected).abs().max().item(), expected.abs().max().item()
    if not gap <= bound * largest:
        raise AssertionError(f"{what} differ by {gap:.2g} of {largest:.2g}")


def decoded(model: nn.Module, rounding: float) -> None:
    """The logits of every generated token are those of one pass over the text."""
    ids = ids_of(model)
    found = model.eval().generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=6,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    with torch.no_grad():
        whole = model(input_ids=found.sequences[:, :-1], use_cache=False).logits[:, ids.shape[1] - 1 :]
    assert_close(torch.stack(found.logits, dim=1).float(), whole.float(), rounding, "decoding and one pass")


def trained(model: PreTrainedModel, word: str, rounding: float) -> None:
    """Three steps of LoRA lower the loss, every factor gets a gradient, and the adapter acts while decoding."""
    before = logits_of(model)
    torch.manual_seed(0)
    adapted = get_peft_model(model, lora_config(model, [word], r=4)).train()
    factors = {name: factor for name, factor in adapted.named_parameters() if factor.requires_grad}
    optimizer = torch.optim.AdamW(factors.values(), lr=0.02)
    losses, ids = [], ids_of(model)
    for _ in range(3):
        loss = adapted(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        losses.append(loss.item())
        idle = [name for name, factor in factors.items() if factor.grad is None or not factor.grad.isfinite().all()]
        if idle or (len(losses) > 1 and any(not factor.grad.any() for factor in factors.values())):
            raise AssertionError(f"no gradient: {', '.join(idle) or 'zeros'}")
        optimizer.step()
        optimizer.zero_grad()
    if not losses[2] < losses[0]:
        raise AssertionError(f"three steps took the loss from {losses[0]:.4f} to {losses[2]:.4f}")
    decoded(adapted, rounding)
    with adapted.disable_adapter():
        assert_close(logits_of(adapted), before, 1e-6, "the logits without the adapter")


def load(quantiser: Quantiser, folder: Path) -> str:
    counts = [
        count(quantiser, quantiser.load(each, folder)) for each in (DeepseekV3ForCausalLM, DeepseekMoeForCausalLM)
    ]
    # This package's own quantises with its own class only: experts are one weight, not a layer.
    if not counts[1] or (quantiser.config is not NF4Config and counts[0] != counts[1]):
        raise AssertionError(f"{counts[1]} layers quantised, {counts[0]} of transformers' own class")
    return f"{counts[1]} of {counts[0]} layers"


def forward(quantiser: Quantiser, folder: Path) -> str:
    plain, model = DeepseekMoeForCausalLM.from_pretrained(folder), quantiser.load(DeepseekMoeForCausalLM, folder)
    difference = (logits_of(model) - logits_of(plain)).norm() / logits_of(plain).norm()
    if not 0 < difference < 0.5:
        raise AssertionError(f"logits differ by {difference:.2f} from those of the weights as they were")
    return f"{difference:.1%}"


def generate(quantiser: Quantiser, folder: Path) -> None:
    decoded(quantiser.load(DeepseekMoeForCausalLM, folder), quantiser.rounding)


def lora(word: str, quantiser: Quantiser, folder: Path) -> None:
    trained(quantiser.load(DeepseekMoeForCausalLM, folder), word, quantiser.rounding)


def save(quantiser: Quantiser, folder: Path) -> Path:
    """Saved after a pass, as models are: the config says what the weights are."""
    model = quantiser.load(DeepseekMoeForCausalLM, folder)
    decoded(model, quantiser.rounding)
    target = folder.parent / "saved"
    model.save_pretrained(target)
    saved = json.loads((target / "config.json").read_text(encoding="utf-8"))
    if not saved.get("quantization_config"):
        raise AssertionError("the config does not say that the weights are quantised")
    return target


def reload(quantiser: Quantiser, folder: Path) -> None:
    model, target = quantiser.load(DeepseekMoeForCausalLM, folder), save(quantiser, folder)
    again = DeepseekMoeForCausalLM.from_pretrained(target, dtype=quantiser.dtype)
    if count(quantiser, again) != count(quantiser, model):
        raise AssertionError(f"{count(quantiser, again)} layers quantised, {count(quantiser, model)} saved")
    assert_close(logits_of(again), logits_of(model), 1e-6, "the logits after reloading")
    decoded(again, quantiser.rounding)


TRIALS: dict[str, Callable[[Quantiser, Path], Any]] = {
    "load": load,
    "forward": forward,
    "generate": generate,
    "LoRA on attention": functools.partial(lora, "attention"),
    "LoRA on shared experts": functools.partial(lora, "shared_experts"),
    "LoRA on routed experts": functools.partial(lora, "routed_experts"),
    "save": save,
    "reload": reload,
}
