"""Exit codes of entries, for launchers and the supervisor. Standard library only.

0: done. 1: a failure that may go away, or a defect of the program: worth another start. 130, 143: saved and stopped on
SIGINT, SIGTERM: somebody wants it to end.
"""

from __future__ import annotations

USER_ERROR = 2  # another start would fail again
PREEMPTED = 85  # saved and stopped on SIGUSR1: whoever has more time starts it again
HUNG = 86  # the watchdog ended a rank that made no progress: start it again
ALONE = 87  # a signal came, and the ranks did not agree in time: nothing saved, start it again
