"""The settings of tuning: those that all kinds have, and each kind's own. Standard library only.

In: values from YAML and the command line. Out: checked dataclasses. Start with `common.py`.
"""
