"""The command `deepseek-moe`: thin verbs, whose work and whose imports are elsewhere.

main.py      `finetune`, `experts`, `convert`, `push`, `plan`, `demo`
preview.py   `preview`
use.py       `evaluate`, `chat`
recipes.py   `recipes`, `keys`; completion of both
esft.py      `esft score`, `esft select`
__main__.py  `python -m modeling_deepseek_moe.cli`
"""
