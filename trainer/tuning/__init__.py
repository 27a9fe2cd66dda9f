"""Tuning of a trained model on examples: what its entries share, and scores on labelled examples.

In: a `TuneConfig` and a reader of examples. Out, before torch is imported: a checked config, a vocabulary with the
special tokens, and the examples in the order of the run, some held out. Start with `check.py`. While a fine-tuning
trains, `scores.py` finds the figures of its held-out examples and the picture of their confusion matrix.
"""
