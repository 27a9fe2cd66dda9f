"""Protection of a run: spikes, rollback, recomputation checks, the watchdog and its hang reports.

In: losses, norms, heartbeats. Out: skipped steps, rollbacks, an ended run with its reason. Start with `spike_guard.py`
and `watchdog.py`.
"""
