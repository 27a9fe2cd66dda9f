"""Runs as Slurm jobs: job scripts and the meeting of ranks.

In: a `Job`. Out: a submitted script. Start with `launcher.py`.
"""
