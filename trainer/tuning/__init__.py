"""Tuning of a trained model on examples: what its entries share before torch is imported.

In: a `TuneConfig` and a reader of examples. Out: a checked config, a vocabulary with the special tokens, and the
examples in the order of the run, some held out. Start with `check.py`.
"""
