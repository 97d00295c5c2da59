"""Streaming converters between the formats DeepSeekMoE checkpoints come in; see README.md of this folder."""

from .convert import ConversionReport, convert
from .engine.target import ConversionError
from .formats.formats import FORMATS
from .request import ADAPTER_FORMATS
from .upcycle.upcycle import UpcycleOptions

__all__ = ["ADAPTER_FORMATS", "FORMATS", "ConversionError", "ConversionReport", "UpcycleOptions", "convert"]
