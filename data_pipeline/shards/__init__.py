"""Documents to shards: tars of token blocks with an index and a manifest, and back.

In: a corpus and a tokenizer. Out: a folder that `data_pipeline.stream` reads. Start with `write.py`.
"""
