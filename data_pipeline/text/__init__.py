"""Texts as hashes of their words: duplicates, and the n-grams of evaluation sets, are found by these.

In: texts. Out: hashes of words and n-grams (hashing.py), and which n-grams of evaluation sets texts hold (grams.py).
Start with `hashing.py`.
"""
