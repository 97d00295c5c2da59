"""What touches modules: loading, LoRA, four bits, ESFT layers, counting and balancing experts.

load.py            the model that a recipe names, with the part of it that is trained
checks.py          what their files may say and hold
use.py             models as they are used: loaded, with an adapter on them
tokenizer.py       their tokenizer, also where a repository has it as code
tiktoken_files.py  tokenizers of Moonlight and Kimi-K2, read without running their code
lora.py            LoRA in words
quantization.py    the recipe key that puts frozen weights into four bits
chosen_experts.py  layers in which only the chosen experts are trained
esft_adapter.py    what was trained so, in DeepSeek's format, and back onto a model
spread.py          models that are spread over processes while they are read
spread_state.py    their weights and moments in checkpoints
shards.py          their weights file by file, as one process would save them
gather.py          weights that lie in parts in several processes, whole
counting.py        tokens that each expert serves
resume.py          optimizer and random numbers of a Trainer whose model is spread over processes
balance.py         the selection biases: moved once a step, and kept in checkpoints of adapters
"""
