"""Publishing: what is staged, checked and uploaded.

push.py     `deepseek-moe push`
staging.py  the folder that is pushed: weights checked, merged, in another type or with their code
upload.py   claimed repositories, tries, no token in a message
"""
