"""One run, from a recipe to a saved model.

one_run.py      the run from top to bottom
trainer.py      the Trainer: goes on from a checkpoint, stops at a loss that is no number
unlogged.py     what is not logged yet, kept in checkpoints
lines.py        what is shown while it trains
stop.py         SIGTERM: a checkpoint is saved, and the run ends
preferences.py  TRL's DPOTrainer under a recipe
held_out.py     the loss on held-out rows, alike on any number of processes; measuring before the first step
metric.py       the recipe's metric, before and after
save.py         the trained weights
summary.py      the numbers of `summary.json`, and the closing table
"""
