"""Streaming converters between DeepSeek's checkpoint formats and this package's, one module a format; none so far."""
