"""The classifier that tells good text from raw web text (GPT-3's appendix A).

In: two corpora. Out: a model file, scores and plots. Start with `model.py`; training is in `train.py`, the step of a
recipe in `filter.py`.
"""
