"""Raw archives, links and texts to clean documents: every record is kept, or dropped with a reason.

In: the files of a corpus and its recipe. Out: documents, a report, and perhaps shards. Start with `recipes.py`.
"""
