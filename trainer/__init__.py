"""Batches to a trained model: settings, model, engine, loop, checkpoints, tracking, and the commands that use them.

In: a `TrainConfig` and a task (objective and feed). Out: a run folder with checkpoints and metrics. Start with
`loop.py`; one step is in `step.py`, the row of metrics of a step in `summary.py`, building in `setup.py`, the
`Task` in `task.py`.
"""
