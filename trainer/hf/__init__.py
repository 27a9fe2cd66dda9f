"""Hugging Face's names, settings and folders for our weights, without transformers.

In: a Hugging Face folder or our checkpoint. Out: the other. Start with `weights.py`.
"""
