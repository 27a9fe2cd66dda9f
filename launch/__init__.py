"""Starting and watching runs from a login node, without torch.

In: the settings of a run and of a cluster. Out: a submitted job, a plan, a report of a run or of the cluster. Start
with `submit.py`; `supervise.py` restarts a run, `doctor.py` checks a cluster, `plan.py` prints what a run would cost.
"""
