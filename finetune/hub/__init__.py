"""Publishing: what is staged, checked and uploaded.

push.py     `deepseek-moe push`
staging.py  the folder that is pushed: weights checked, merged, in another type or with their code
parts.py    which files a model or an adapter consists of
upload.py   claimed repositories, tries, no token in a message
"""
