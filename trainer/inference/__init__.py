"""Text and probabilities from a model: sampling and scoring for generation, evaluation, roll-outs and chat.

In: a `GPT` on any layout and token ids. Out: new tokens (`sampler.py`, start here; the likeliest ones: `beam.py`) or
the log-probability of given tokens (`scorer.py`).
"""
