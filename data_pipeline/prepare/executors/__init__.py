"""Where the tasks of a recipe run: this machine, Slurm or Ray.

In: stages and their tasks. Out: finished tasks. Start with `executors.py`.
"""
