"""Sources that are not local folders, and the cache of a node that their blocks pass through.

In: a URL or a pipe, and a shard of its manifest. Out: checked blocks of tokens. Start with `source.py`; `backends.py`
reads bytes, `fetch.py` bounds and repeats a read, `cached_shard.py` keeps the blocks of one shard in the cache.
"""
