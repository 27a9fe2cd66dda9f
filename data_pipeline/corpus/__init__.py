"""Raw inputs to documents: text files, JSON lines, Parquet, EPUB, tars of text, Python's own prose.

In: the files of a `CorpusConfig`. Out: `Document`s, and a `Dropped` for each record without one. Start with `read.py`.
"""
