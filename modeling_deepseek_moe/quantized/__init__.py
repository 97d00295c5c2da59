"""Weights in four bits: how they are kept and loaded."""
