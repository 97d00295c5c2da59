"""What a run's folder is, and what a finished run left in it.

folder.py       whose the folder is, who works in it, and what a run that goes on finds there
checkpoints.py  which checkpoints are as they were written, and which one a run goes on from
seals.py        folders whose files are known again by size and SHA-256
together.py     processes of one run end together
lock.py         one process at a time works in a folder
results.py      what there is to publish: of a run, or a folder from elsewhere
named.py        the model and the adapter that a verb is to use, where it is told a run
"""
