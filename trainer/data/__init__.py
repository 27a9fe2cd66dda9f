"""What a run is fed: sources, the feed of batches, sharing inside a tensor-parallel group.

In: the data settings. Out: batches with their position. Start with `feed.py`.
"""
