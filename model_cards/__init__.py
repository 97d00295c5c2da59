"""Cards: of what is published after a run, of the released models, and of the demo's base.

card.py          the card of a published model, from the folder of its run; `card.md.jinja` is its text
metadata.py      what the Hub asks of its header
ways_to_load.py  its code: transformers, PEFT, vLLM, SGLang
reference.py     the cards in `reference/`, from presets and the figures in `released.yaml`
demo_base/       the demo's base, and in `scripts/` what made it: only in a checkout
"""
