"""`python -m tests.helpers.direct N MODULE OVERRIDES...`: a launcher that starts at once.

Where a rank ends badly, the others have GRACE_S to end by themselves and are then killed, as srun --kill-on-bad-exit
does; exits with the first such code.
"""

from __future__ import annotations

import subprocess
import sys
import time

from tests.helpers.ranks import free_port, rank_env

GRACE_S = 2.0


def launch(ranks: int, module: str, words: list[str]) -> int:
    port, argv = free_port(), [sys.executable, "-m", module, *words]
    processes = [subprocess.Popen(argv, env=rank_env(r, ranks, port)) for r in range(ranks)]
    bad, deadline = 0, float("inf")
    while None in (codes := [p.poll() for p in processes]) and time.monotonic() < deadline:
        if not bad and (bad := next(filter(None, codes), 0)):
            deadline = time.monotonic() + GRACE_S
        time.sleep(0.02)
    for p in processes:
        p.kill()
    bad = bad or next(filter(None, (p.wait() for p in processes)), 0)
    return bad if bad >= 0 else 128 - bad


if __name__ == "__main__":
    sys.exit(launch(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
