"""Rules that keep or drop a document by its text or its URL, and one that masks personal data.

In: documents. Out: the documents that stay, and for each other one the reason. Each rule is a `Step` made from its part
of the recipe. Start with `gopher.py`; a rule runs once `filters` of `recipes.py` lists it.
"""
