"""Expert products on tokens sorted by expert, in plain PyTorch.

sorted_mm.py  `experts_implementation="sorted_mm"`, the default on CPU
experts.py    the product behind it and behind LoRA: forward and backward, one expert after the other
rows.py       pairs of token and expert, sorted into the rows of each expert
low_rank.py   LoRA factors as PEFT stores them, as the products take them
"""
