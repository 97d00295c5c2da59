"""Which experts serve which data: counted, drawn, scored, chosen for ESFT.

report.py      `deepseek-moe experts`
routing.py     what it counts: tokens and weights of each expert, how far two sets are apart
plots.py       heat map of the experts, loss curve
watch.py       the experts of a model while it trains: logs, heat map, table
scores.py      ESFT: which experts serve a task, and which of them to train
score_data.py  `deepseek-moe esft score` and `esft select`
choose.py      the choice at the beginning of a run
"""
