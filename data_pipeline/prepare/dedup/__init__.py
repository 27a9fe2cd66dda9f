"""Removal of documents that occur twice, or nearly: by URL, by text, by MinHash.

In: the documents of each part. Out: keys of each part (keys.py), then one decision over all parts (clusters.py): a code
for each document that says why it is dropped. Start with `clusters.py`.
"""
