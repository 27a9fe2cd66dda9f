"""The version of the code: the commit, the changes to it, and every installed package. Standard library only."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from trainer.run.redact import redact

ROOT = Path(__file__).resolve().parents[2]
MAX_PATCH = 8 << 20  # bytes
GIT_S = 60.0  # a checkout on a slow disk


def code_version() -> tuple[dict[str, Any], bytes]:
    """(facts about the code, the patch from its commit to it); the patch is b"" if there is none or if it is too big.

    Secrets are cut from the patch; the fact `patch` says in how many lines. No checkout is no mistake: then the fact
    `git` has the reason why no commit is known.
    """
    code: dict[str, Any] = {"python": platform.python_version(), "packages": packages()}
    try:
        _git("ls-files", "--error-unmatch", "--", str(Path(__file__).resolve()))  # of this project, not one around it
        commit = _git("rev-parse", "HEAD").decode().strip()
        changed = _git("status", "--porcelain", "--", ".").decode(errors="replace").splitlines()
        patch = _git("diff", "--binary", "--no-ext-diff", "--no-textconv", "HEAD", "--", ".") if changed else b""
    except (OSError, subprocess.SubprocessError) as e:
        said = e.stderr.decode(errors="replace") if isinstance(e, subprocess.CalledProcessError) else str(e)
        return code | {"git": " ".join(said.split())[:300]}, b""
    code |= {"commit": commit, "dirty": bool(changed), "untracked": [x[3:] for x in changed if x[:2] == "??"][:100]}
    if len(patch) > MAX_PATCH:
        code["patch"] = f"left out: {len(patch)} bytes, at most {MAX_PATCH} are kept"
        return code, b""
    patch, cut = redacted(patch)
    return code | ({"patch": f"cut: what looks like a secret, in {cut} lines"} if cut else {}), patch


def redacted(patch: bytes) -> tuple[bytes, int]:
    """(the patch without secrets, the number of lines in which some were); changes of binary files stay as they are."""
    files = re.split(rb"(?m)^(?=diff --git )", patch)
    shown = b"".join(file if b"\nGIT binary patch\n" in file else _redacted(file) for file in files)
    return shown, sum(a != b for a, b in zip(patch.split(b"\n"), shown.split(b"\n"), strict=True))


def _redacted(text: bytes) -> bytes:
    return redact(text.decode(errors="surrogateescape")).encode(errors="surrogateescape")


def packages() -> dict[str, str]:
    """Every installed distribution and its version."""
    named = ((d.metadata["Name"], d.version) for d in distributions())
    return dict(sorted((name, version) for name, version in named if name))


def _git(*words: str) -> bytes:
    env = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
    done = subprocess.run(["git", "-C", str(ROOT), *words], env=env, capture_output=True, timeout=GIT_S, check=True)
    return done.stdout
