"""Streaming converters between the formats DeepSeekMoE checkpoints come in; see README.md of this folder."""

from modeling_deepseek_moe.lazy import hand_out

_HOMES = {
    "ADAPTER_FORMATS": ".request",
    "FORMATS": ".formats.table",
    "ConversionError": ".engine.target",
    "ConversionReport": ".one_conversion",
    "UpcycleOptions": ".upcycle.split",
    "convert": ".one_conversion",
}
__all__ = list(_HOMES)
__getattr__, __dir__ = hand_out(__name__, _HOMES)
