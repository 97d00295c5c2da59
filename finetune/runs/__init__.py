"""What a run's folder is, and what a finished run left in it.

folder.py   whose the folder is, and which checkpoints in it are whole
results.py  what there is to publish: of a run, or a folder from elsewhere
"""
