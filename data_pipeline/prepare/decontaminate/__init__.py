"""Removal of training documents that overlap with evaluation sets.

In: documents and files of evaluation text. Out: documents without the overlapping passages, and counts.
Start with `decontaminate.py`.
"""
