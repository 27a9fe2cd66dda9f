"""Executors run the tasks of a recipe: on this machine, over Slurm or over Ray.

In: stages and their tasks. Out: finished tasks. Start with `executors.py`.
"""
