"""Data, from raw archives to batches: archives -> documents -> shards -> batches. Never imports trainer.

In: web archives, books, text files. Out: batches of token ids for any step of a run. To prepare data, start with
`prepare/`; to see how a run reads it, with `manifest.py`, then `order/plan.py` and `stream/loader.py`.
"""
