"""How an entry ends, for launchers and the supervisor. Standard library only.

0: done. 1: what may pass, or a defect of the program: worth another start. 130, 143: saved and stopped on SIGINT,
SIGTERM: somebody wants it to end.
"""

from __future__ import annotations

USER_ERROR = 2  # would only be made again
PREEMPTED = 85  # saved and stopped on SIGUSR1: whoever has more time starts it again
HUNG = 86  # the watch ended a rank that came no further: start it again
ALONE = 87  # a signal came, and the ranks did not agree in time: nothing saved, start it again
