"""The demo: a task, a small base, a local Hub.

one_demo.py    `deepseek-moe demo`
task.py        what is learned, and its scorer
local_hub.py   a small Hub on this machine, for pushing and pulling without a network
hub_bodies.py  what it reads of a request
hub_store.py   what it keeps on disk
"""
