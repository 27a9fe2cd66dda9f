"""Checkpoints in the model's own global layout: saved without a gather, loaded on any layout.

In: an engine, or a checkpoint folder. Out: a published folder, or restored state. Start with `save.py` and `load.py`.
"""
