"""Evaluation: what a model knows, by tasks of the papers' protocols.

In: texts that a model wrote or scored, and right answers. Out: figures with their standard errors. Start with
`metrics.py`.
"""
