"""Makes the transformers Auto classes know the family."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from ._compat import read_tokenizers_as_they_are
from .configuration_deepseek_moe import DeepseekMoeConfig
from .families import FAMILIES
from .modeling_deepseek_moe import (
    DeepseekMoeForCausalLM,
    DeepseekMoeForSequenceClassification,
    DeepseekMoeForTokenClassification,
    DeepseekMoeModel,
)

_CLASS_OF_AUTO = {
    AutoModel: DeepseekMoeModel,
    AutoModelForCausalLM: DeepseekMoeForCausalLM,
    AutoModelForSequenceClassification: DeepseekMoeForSequenceClassification,
    AutoModelForTokenClassification: DeepseekMoeForTokenClassification,
}


def register(replace_native: bool = False) -> None:
    """Registers the family with the Auto classes; importing the package calls it once.

    `deepseek_moe` and the types that the installed transformers does not know (`deepseek`, `kimi_k2`; with older
    releases some of the siblings' too) load this package's classes.

    Args:
        replace_native: also hand it, for this process, the types that transformers has classes of its own for:
            `deepseek_v2`, `deepseek_v3`, `glm4_moe_lite` and all others of `families.FAMILIES`.
    """
    AutoConfig.register("deepseek_moe", DeepseekMoeConfig, exist_ok=True)
    unknown = [model_type for model_type in FAMILIES if model_type not in CONFIG_MAPPING_NAMES]
    for model_type in FAMILIES if replace_native else unknown:
        # AutoConfig.register wants a class whose own type this is; ours translates while reading.
        CONFIG_MAPPING.register(model_type, DeepseekMoeConfig, exist_ok=True)
    read_tokenizers_as_they_are(("deepseek_moe", *unknown))
    for auto_class, model_class in _CLASS_OF_AUTO.items():
        auto_class.register(DeepseekMoeConfig, model_class, exist_ok=True)
