"""The values of every command as YAML in groups, and the code that composes them into checked dataclasses.

In: a dataclass and the words of a command line. Out: the dataclass, filled and checked, or an error of one line.
Start with `schema.py`; `frozen.py` writes a config to a file and reads it back.
"""
