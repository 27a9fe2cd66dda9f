"""Words, their hashes and their repetition: what rules, deduplication and decontamination measure texts by.

In: a text. Out: words, n-gram hashes, shares. Start with `words.py`.
"""
