"""Web archives: their bytes, records and pages.

In: WARC, ARC and WET files, whatever is wrong with them. Out: documents, or the reason why a record is none, each with
the position to go on from. Start with `archive.py`.
"""
