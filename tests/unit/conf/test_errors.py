"""Errors of the operating system: what happened decides whether another start may help, not the file it happened to."""

from __future__ import annotations

import ast
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conf.errors import PERMANENT, TRANSIENT, TransientError, UserError, may_pass, of_nature

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("number", "passes"),
    [(getattr(errno, name), True) for name in ("ENOSPC", "EIO", "ESTALE", "EDQUOT", "ETIMEDOUT", "EHOSTDOWN")]
    + [(getattr(errno, name), False) for name in ("ENOENT", "EACCES", "EROFS", "EISDIR", "ENAMETOOLONG")],
)
def test_what_happened_decides_if_it_may_pass(number: int, passes: bool) -> None:
    error = OSError(number, os.strerror(number))
    assert may_pass(error) is passes
    assert type(of_nature(error, "x")) is (TransientError if passes else UserError)


def test_no_error_both_stays_and_passes() -> None:
    assert not PERMANENT.keys() & TRANSIENT.keys()
    assert may_pass(TransientError()) and not may_pass(UserError()) and not may_pass(ValueError())


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 1), (errno.EACCES, 2)])
def test_a_command_ends_by_the_nature_of_its_error(number: int, code: int) -> None:
    program = (
        "import sys\nfrom conf.schema import run\nfrom launch.config import StatusConfig\n"
        f"def fail(cfg): raise OSError({number}, 'it')\n"
        "sys.argv[1:] = ['run_dir=x']\nrun(StatusConfig, fail)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == code and done.stderr.count("\n") == 1, done.stderr


def judged_by_file(source: str) -> list[int]:
    """Lines that turn an OSError of any kind into a UserError or TransientError without a look at what happened."""
    return [
        raised.lineno
        for handler in ast.walk(ast.parse(source))
        if isinstance(handler, ast.ExceptHandler) and handler.type is not None
        if "OSError" in [node.id for node in ast.walk(handler.type) if isinstance(node, ast.Name)]
        if "out_of_memory(" not in ast.unparse(handler)  # which looks at what happened
        for raised in ast.walk(handler)
        if isinstance(raised, ast.Raise) and isinstance(raised.exc, ast.Call)
        if isinstance(raised.exc.func, ast.Name) and raised.exc.func.id in ("UserError", "TransientError")
    ]


def test_no_handler_of_any_oserror_says_itself_what_kind_it_is() -> None:
    assert judged_by_file("try: f()\nexcept (ValueError, OSError) as e:\n raise UserError(e)") == [3]
    assert judged_by_file("try: f()\nexcept FileNotFoundError as e:\n raise UserError(e)") == []
    packages = ("conf", "data_pipeline", "launch", "trainer")
    found = {
        str(path.relative_to(ROOT)): lines
        for package in packages
        for path in (ROOT / package).rglob("*.py")
        if (lines := judged_by_file(path.read_text(encoding="utf-8")))
    }
    assert not found
