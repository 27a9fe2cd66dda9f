"""The text of HTML pages, within limits of time and memory that a hostile page cannot pass.

In: a page's bytes. Out: its text, or the reason why there is none. Start with `extract.py`.
"""
