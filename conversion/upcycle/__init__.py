"""Experts out of a dense model: its feed-forwards cut into groups of neurons."""
