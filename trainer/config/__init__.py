"""Every setting of a run, as dataclasses with their checks. Standard library only.

In: values from YAML and the command line. Out: checked dataclasses. Start with `pretrain.py`.
"""
