"""Checks of the nodes of an allocation before a run: `launch.doctor` starts them there.

In: ranks on nodes. Out: one JSON line of results. Start with `node_check.py`.
"""
