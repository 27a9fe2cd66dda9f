"""Metrics: to the journal on disk at once, to MLflow as it answers; no failure of either ends a run.

In: rows of numbers. Out: `metrics.jsonl`, an MLflow run, plots. Start with `tracker.py`.
`trainer/summary.py` makes the rows.
"""
