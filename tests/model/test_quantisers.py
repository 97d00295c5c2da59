"""Every quantiser does to this package's model what it does to transformers' own class, or is refused by name.

bitsandbytes, torch and this package's own run everywhere. torchao, quanto and hqq run where they are installed
(`pip install --no-deps torchao optimum-quanto ninja hqq einops termcolor`): torchao takes more than a second at every
import of PEFT, in each of the processes that the tests start.
"""

import functools

import pytest
from quantisers import QUANTISERS, TRIALS, Quantiser, native_folder

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
