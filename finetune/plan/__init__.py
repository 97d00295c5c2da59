"""Whether a recipe fits, on the GPU and on the disk.

report.py  `deepseek-moe plan`: what is printed
fit.py     where a recipe fits, and what to change where it does not
memory.py  the peak of a training step: weights, states, and a walk through forward and backward
model.py   its weights: the model on the meta device, with the recipe's adapters
layers.py  its activations, tensor by tensor
layout_report.py  how several GPUs would share the model out: what is printed of it
layouts.py what each of them needs then, and which layout to take
ranks.py   what each of them holds, by the sharding code of training
traffic.py what they send each other
disk.py    the files of a run
"""
