"""Makes the transformers Auto classes know the family."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ._compat import read_tokenizers_as_they_are
from .configuration_deepseek_moe import DeepseekMoeConfig
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
_UNKNOWN_TO_TRANSFORMERS = ("deepseek", "kimi_k2")
_NATIVE = ("deepseek_v2", "deepseek_v3")


def register(replace_native: bool = False) -> None:
    """Registers the family with the Auto classes; importing the package calls it once.

    `deepseek_moe` and the types transformers does not know (`deepseek`, `kimi_k2`) load this package's classes.

    Args:
        replace_native: also hand `deepseek_v2` and `deepseek_v3` checkpoints to this package, for this process.
    """
    AutoConfig.register("deepseek_moe", DeepseekMoeConfig, exist_ok=True)
    for model_type in _UNKNOWN_TO_TRANSFORMERS + (_NATIVE if replace_native else ()):
        # AutoConfig.register wants a class whose own type this is; ours translates while reading.
        CONFIG_MAPPING.register(model_type, DeepseekMoeConfig, exist_ok=True)
    read_tokenizers_as_they_are(("deepseek_moe", *_UNKNOWN_TO_TRANSFORMERS))
    for auto_class, model_class in _CLASS_OF_AUTO.items():
        auto_class.register(DeepseekMoeConfig, model_class, exist_ok=True)
