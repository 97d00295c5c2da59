"""The streaming core, which knows no format: what is read, what is made of it, what is written.

source.py      a checkpoint to convert, and every check that needs no tensor's values
beside.py      what lies beside its weights: configs, and files that are taken along
plan.py        the files to write, and the step that makes each tensor
operations.py  those steps: copy, cast, dequantize, quantize; each checks its own result
slices.py      the same for tensors that lie in slices
writing.py     the worker: reads ahead, converts, writes in place
target.py      the folder that is written: a kill leaves nothing that looks finished
"""
