"""Text to token ids and back.

In: text and a tokenizer.json. Out: ids. Start with `tokenizer.py`; known vocabularies are in `vocabularies.py`.
"""
