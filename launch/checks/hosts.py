"""Checks of ssh hosts: each answers without a question and has the same Python, code and time as this one."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.diagnostics.check_result import CheckResult, fail, ok, warn

CONNECT_S = 5
SKEW_S = 1.0
PACKAGES = {"ssh": "openssh-client", "mpirun": "openmpi-bin", "ompi_info": "openmpi-bin"}  # Debian's, of other names
MOST = 1 << 16  # bytes of a line of an answer
PROBE = """
import json, subprocess, sys, time
from importlib.metadata import PackageNotFoundError, version
try:
    gradus = version("gradus")
except PackageNotFoundError:
    gradus = None
git = ["git", "-C", sys.argv[1], "rev-parse", "HEAD"]
try:
    commit = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip() or None
except (OSError, subprocess.TimeoutExpired):
    commit = None
print(json.dumps({"gradus": gradus, "commit": commit, "python": sys.version.split()[0]}), flush=True)
sys.stdin.readline()
print(json.dumps({"time": time.time()}), flush=True)
"""


def programs(names: Sequence[str]) -> CheckResult:
    absent = [name for name in names if shutil.which(name) is None]
    if absent:
        wanted = dict.fromkeys(PACKAGES.get(name, name) for name in absent)
        return fail("programs", f"not in PATH: {', '.join(absent)}", f"apt-get install {' '.join(wanted)}")
    return ok("programs", ", ".join(names))


def reachable(name: str, root: Path) -> CheckResult:
    """Check one host over ssh, with the Python and checkout paths of this machine."""
    what = f"host {name}"
    probe = [sys.executable, "-c", PROBE, str(root)]
    ours, _, _ = _ask(probe)
    ssh = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_S}", "--", name, shlex.join(probe)]
    theirs, skew, bound = _ask(ssh)
    if "error" in theirs:
        cure = f"ssh {name} must work without a question: ssh-copy-id, and its key in known_hosts"
        if theirs["code"] in (126, 127):
            cure = f"install the same Python there: {sys.executable} must start on every host"
        return fail(what, f"{theirs['error'] or 'no answer'}", cure)
    differ = [
        f"{key} {theirs.get(key)}, here {ours.get(key)}"
        for key in ("python", "gradus", "commit")
        if theirs.get(key) != ours.get(key)
    ]
    if differ:
        return fail(what, "; ".join(differ), f"bring {root} and {sys.prefix} there to the same state")
    text = f"answers, same Python and code, clock {skew:+.3f} s (error at most {bound:.3f} s)"
    if abs(skew) > SKEW_S + bound:
        return warn(
            what, text, "start NTP on all hosts (timedatectl set-ntp true): logs and heartbeats tell by the clock"
        )
    return ok(what, text)


def _ask(argv: list[str]) -> tuple[dict[str, Any], float, float]:
    """(the probe's facts, seconds that its clock is ahead of ours, the largest error of that)."""
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
    ) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        try:
            facts = json.loads(process.stdout.readline(MOST))
            sent = time.time()
            print(flush=True, file=process.stdin)
            theirs = float(json.loads(process.stdout.readline(MOST))["time"])
            came = time.time()
            if not isinstance(facts, dict):
                raise ValueError(facts)
        except (ValueError, KeyError, TypeError, OSError):
            said = process.stderr.read(MOST).strip().splitlines()
            return {"error": said[-1] if said else "", "code": process.wait()}, 0.0, 0.0
    return facts, theirs - (sent + came) / 2, (came - sent) / 2
