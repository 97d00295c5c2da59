"""Streaming converters between the formats DeepSeekMoE checkpoints come in; see README.md of this folder."""

from .convert import ConversionReport, convert
from .formats import FORMATS
from .request import ADAPTER_FORMATS
from .target import ConversionError
from .upcycle import UpcycleOptions

__all__ = ["ADAPTER_FORMATS", "FORMATS", "ConversionError", "ConversionReport", "UpcycleOptions", "convert"]
