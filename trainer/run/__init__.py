"""The files and exit codes of a run, without torch: folder, journal, heartbeats, environment. `launch` reads them too.

In: a run folder. Out: paths of checkpoints, journal rows, heartbeats, exit codes. Start with `folder.py`.
"""
