"""Streaming converters between the formats DeepSeekMoE checkpoints come in; see README.md of this folder."""

from .engine.target import ConversionError
from .formats.table import FORMATS
from .one_conversion import ConversionReport, convert
from .request import ADAPTER_FORMATS
from .upcycle.split import UpcycleOptions

__all__ = ["ADAPTER_FORMATS", "FORMATS", "ConversionError", "ConversionReport", "UpcycleOptions", "convert"]
