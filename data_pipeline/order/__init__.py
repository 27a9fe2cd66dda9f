"""The order of the data: which window of which shard each step of a run takes.

In: token counts of shards, weights, a seed and the ledger of events. Out: windows for any position, computed without
reading data. Start with `plan.py`; docs/order.md explains the mathematics.
"""
