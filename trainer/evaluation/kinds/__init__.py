"""The kinds of tasks: each asks the model about documents and makes figures of its answers.

In: documents, prompts and a `Scoring`. Out: an `Outcome`. Start with `kind.py`.
"""
