"""Evaluation: what a model knows, by tasks of the papers' protocols or of lm-evaluation-harness.

In: a model on any layout, the description of a task (conf/task/) and its files. Out: figures with their standard
errors, and a report. Start with `evaluation.py`; `kinds/` has one file for each kind of task.
"""
