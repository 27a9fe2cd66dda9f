"""Ranks and what they do together: process groups, seeds, collectives, errors of lost ranks.

In: the environment of a launcher. Out: a `Mesh`. Start with `mesh.py`.
"""
