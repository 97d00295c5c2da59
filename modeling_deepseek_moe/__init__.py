"""DeepSeekMoE models for transformers: load, fine-tune and ship every model built on the DeepSeekMoE block."""

from ._compat import warn_of_untried_releases
from .auto import register
from .checkpoint_files import CheckpointError
from .configuration_deepseek_moe import DeepseekMoeConfig
from .kernels import register_kernels
from .modeling_deepseek_moe import (
    DeepseekMoeForCausalLM,
    DeepseekMoeForSequenceClassification,
    DeepseekMoeForTokenClassification,
    DeepseekMoeModel,
)

__version__ = "0.1.0"
__all__ = [
    "CheckpointError",
    "DeepseekMoeConfig",
    "DeepseekMoeForCausalLM",
    "DeepseekMoeForSequenceClassification",
    "DeepseekMoeForTokenClassification",
    "DeepseekMoeModel",
    "register",
]

warn_of_untried_releases()
register()
register_kernels()
