"""Weights in four bits: how they are kept and loaded.

weights.py  frozen weights in NF4, dequantised one matrix at a time
loading.py  `from_pretrained(quantization_config=NF4Config())`: made while a checkpoint is read
"""
