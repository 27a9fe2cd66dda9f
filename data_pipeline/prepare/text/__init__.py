"""Words as datatrove's rules count them, and repetition: by these the rules measure texts.

In: texts. Out: words and counts of repetition. Start with `words.py`.
"""
