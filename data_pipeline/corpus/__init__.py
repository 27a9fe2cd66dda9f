"""Raw inputs to documents: text files, JSON lines, Parquet, EPUB, tars of text, Python's own prose.

In: files named by a `CorpusConfig`. Out: `Record`s, or a reason why one is dropped. Start with `read.py`.
"""
