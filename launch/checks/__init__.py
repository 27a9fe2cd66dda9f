"""The checks of launch.doctor. In: the settings. Out: results, each ok, warn or fail with what to do.

Start with `runner.py`.
"""
