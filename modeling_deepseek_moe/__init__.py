"""DeepSeekMoE models for transformers: load, fine-tune and ship every model built on the DeepSeekMoE block.

Importing the package imports neither torch nor transformers: a class comes when it is asked for. From the moment that
transformers' registries are there, before or after this, they know the family.
"""

from .import_hook import call_with_registries
from .lazy import hand_out
from .moved import keep_old_names

__version__ = "0.1.0"
_MODEL = ".modeling_deepseek_moe"
_HOMES = {
    "CheckpointError": ".errors",
    "DeepseekMoeConfig": ".configuration_deepseek_moe",
    "DeepseekMoeForCausalLM": _MODEL,
    "DeepseekMoeForSequenceClassification": _MODEL,
    "DeepseekMoeForTokenClassification": _MODEL,
    "DeepseekMoeModel": _MODEL,
    "UserError": ".errors",
    "register": ".auto",
}
__all__ = list(_HOMES)
__getattr__, __dir__ = hand_out(__name__, _HOMES)


def _register() -> None:
    from ._compat import warn_of_untried_releases
    from .auto import register
    from .kernels import register_kernels

    warn_of_untried_releases()
    register()
    register_kernels()


keep_old_names()
call_with_registries(_register)
