"""Shards to batches: the windows of the plan as tensors.

In: a plan, sources and a rank. Out: `Batch`es for each step. Start with `loader.py`.
"""
