"""Objectives: the quantities that a step minimises, as sums of named terms over examples, tokens or pairs.

In: a model's hidden states and a micro batch. Out: fp32 sums, one a term, and the counts they are divided by. Start
with `objective.py`, then `language_model.py`.
"""
