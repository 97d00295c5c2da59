"""Streaming converters between the formats DeepSeekMoE checkpoints come in; see README.md of this folder."""

from .convert import ConversionReport, convert
from .formats import FORMATS
from .target import ConversionError

__all__ = ["FORMATS", "ConversionError", "ConversionReport", "convert"]
