"""What a recipe may say, and the checks of what it says.

schema.py    one frozen dataclass for all of a run's settings
load.py      from YAML and `key=value`, and back
checks.py    which words the keys may have, and which keys go together
ranges.py    which numbers
sections.py  keys of other libraries' classes, by their own names
keys.py      all keys with type, default and a line, as the command shows them
values.py    reading YAML, checking types
metrics.py   the script of a named metric
"""
