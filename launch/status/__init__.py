"""The state of a run or of a folder of runs, read from its files: `python -m launch.status`.

In: a run folder. Out: a table or JSON. Start with `report.py`.
"""
