"""Experts out of a dense model: its feed-forwards cut into groups of neurons.

split.py    the format `upcycle`
dense.py    a dense Llama, Qwen2 or Qwen3 checkpoint, checked
neurons.py  which neurons make an expert together, and the router that goes with them
"""
