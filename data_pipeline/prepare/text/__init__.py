"""Words, their hashes and their repetition: by these, rules, deduplication and decontamination measure texts.

In: texts. Out: words, hashes of words and n-grams, counts of repetition. Start with `hashing.py`; words as datatrove's
rules count them are in `words.py`.
"""
