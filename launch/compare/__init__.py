"""The difference between runs: what their configs set differently, and their curves in one picture.

In: run folders. Out: a table and a PNG. Start with `compare.py`; `curves.py` reads a journal, `picture.py` draws.
"""
