"""Predicted memory, speed and cost of a run, before a GPU is taken. Standard library only.

In: a config and a cluster. Out: layouts, the fastest that fits first; what a run leaves open is settled by it.
Start with `choose.py`.
"""
