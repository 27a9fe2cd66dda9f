"""Data of a run: the protocol of feeds, the feed of shards, and the sharing of batches in a tensor-parallel group.

In: the data settings. Out: batches with their positions. Start with `feed.py`.
"""
