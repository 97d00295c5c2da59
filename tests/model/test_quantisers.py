"""Every quantiser does to this package's model what it does to transformers' own class, or is refused by name.

bitsandbytes, torch and this package's own run everywhere. torchao, quanto and hqq run where they are installed
(`pip install --no-deps torchao optimum-quanto ninja hqq einops termcolor`): torchao takes more than a second at every
import of PEFT, in each of the processes that the tests start.
"""

import functools

import pytest
import torch
from quantisers import QUANTISERS, TRIALS, Quantiser, native_folder
from tiny import tiny_config, tiny_ids, tiny_model

from modeling_deepseek_moe import DeepseekMoeForCausalLM

_NOT_SAVED = "are not saved: save the adapter, and merge it into the unquantised checkpoint"
REFUSED = {
    ("NF4Config of this package", "save"): _NOT_SAVED,
    ("NF4Config of this package", "reload"): _NOT_SAVED,
    ("quanto int8", "save"): _NOT_SAVED,
    ("quanto int8", "reload"): _NOT_SAVED,
    ("quanto int4", "save"): _NOT_SAVED,
    ("quanto int4", "reload"): _NOT_SAVED,
    ("torch quantize_dynamic", "LoRA on attention"): "is not supported",  # PEFT
    ("torch quantize_dynamic", "LoRA on shared experts"): "is not supported",
    ("torch quantize_dynamic", "LoRA on routed experts"): "no gradient",  # torch's layers have none
    ("torch quantize_dynamic", "save"): "is quantised, but the config has no quantization_config",
    ("torch quantize_dynamic", "reload"): "is quantised, but the config has no quantization_config",
    **{("hqq 4 bits", trial): "HQQ is not available yet" for trial in TRIALS},  # transformers 5.20 to 5.24
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return native_folder(tmp_path_factory.mktemp("native") / "model")


@functools.cache
def _quantiser(name: str) -> Quantiser:
    quantiser = QUANTISERS[name]
    pytest.importorskip(quantiser.library, reason=f"{quantiser.library} is optional, see above")
    return quantiser


@pytest.mark.parametrize("trial", TRIALS)
@pytest.mark.parametrize("name", QUANTISERS)
@pytest.mark.filterwarnings("ignore")  # the libraries' own
def test_a_quantised_model_does_what_it_should_or_says_why_not(name, trial, folder):
    quantiser = _quantiser(name)
    if (name, trial) in REFUSED:
        with pytest.raises((ValueError, AssertionError, NotImplementedError), match=REFUSED[name, trial]):
            TRIALS[trial](quantiser, folder)
    else:
        TRIALS[trial](quantiser, folder)


@pytest.mark.parametrize("name", ["bitsandbytes NF4", "bitsandbytes int8"])
@torch.no_grad()
def test_an_indexer_in_integers_reads_the_states_themselves(name, tmp_path):
    """A quantised layer's weight is uint8 or int8, to which the states must not be rounded."""
    config = tiny_config(
        "v3", num_nextn_predict_layers=0, index_topk=4, index_n_heads=32, index_head_dim=16, hidden_size=64
    )
    tiny_model(config).save_pretrained(tmp_path)
    model, seen = QUANTISERS[name].load(DeepseekMoeForCausalLM, tmp_path), []
    indexer = model.model.layers[0].self_attn.indexer
    indexer.weights_proj.register_forward_hook(lambda layer, args, output: seen.append((args[0], output)))
    model(tiny_ids(config), use_cache=False)
    ((states, weights),) = seen
    assert states.dtype == torch.float32 and QUANTISERS[name].is_quantised(indexer.weights_proj)
    plain = DeepseekMoeForCausalLM.from_pretrained(tmp_path)
    expected = states @ plain.model.layers[0].self_attn.indexer.weights_proj.weight.T
    assert (weights - expected).norm() <= 0.3 * expected.norm()
