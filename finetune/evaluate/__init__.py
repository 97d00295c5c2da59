"""How good a model is: metrics, perplexity, benchmarks, and talking to it.

measure.py       `deepseek-moe evaluate`
answers.py       what rows ask, and what a model answers
metrics.py       scripts that judge answers, by path or by name
perplexity.py    of a text, per token and per byte
harness.py       benchmarks of the LM Evaluation Harness
chat.py          `deepseek-moe chat`: lines, commands, Ctrl-C
conversation.py  its history, and answers that compute only what is new in it
"""
