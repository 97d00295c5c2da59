"""LoRA and ESFT adapters: read, renamed for other programs, merged into a checkpoint.

files.py     a LoRA adapter folder, checked before any tensor is read
patterns.py  regular expressions of its config, refused where a match could take for ever
names.py     stacked experts' adapters for PEFT, a pair for every expert for vLLM and SGLang
stacking.py  the operations between those two
merging.py   adapters added to the weights while a checkpoint is converted
esft.py      ESFT adapters out of two checkpoints, and into one
overlay.py   a checkpoint some of whose tensors are those of an adapter
"""
