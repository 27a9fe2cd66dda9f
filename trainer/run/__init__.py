"""What a run leaves on disk and says of itself, without torch. `launch` reads a run through this package.

In: a run folder. Out: checkpoints' places, journal rows, heartbeats, exit codes. Start with `folder.py`.
"""
