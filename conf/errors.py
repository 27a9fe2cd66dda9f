"""Errors that a user can act on, and the mark of a required value. Every package imports this module."""

from __future__ import annotations

import errno
import re
from typing import Any


class UserError(Exception):
    """A mistake that the user can correct. The message is one line: every operand, and the key to change."""


class TransientError(UserError):
    """A failure that may go away: server down, disk full. Exit code 1: the supervisor tries again."""


MISSING: Any = "???"  # OmegaConf's mark for "must be given"; written out so that this file needs no OmegaConf

PERMANENT = {
    errno.ENOENT: "no such file or folder",
    errno.ENOTDIR: "a file, not a folder",
    errno.EISDIR: "a folder, not a file",
    errno.EEXIST: "it exists already",
    errno.ENOTEMPTY: "the folder is not empty",
    errno.EACCES: "no permission",
    errno.EPERM: "the operation is not permitted",
    errno.EROFS: "the disk is mounted read-only",
    errno.EFBIG: "larger than the disk or `ulimit -f` takes",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ELOOP: "a circle of symbolic links",
    errno.EXDEV: "the two paths are on different disks",
    errno.EINVAL: "the operation is not supported",
    errno.ENOEXEC: "the file is not a program",
}
"""Errors of the operating system that stay until somebody changes something."""

TRANSIENT = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "your quota is used up",
    errno.EIO: "the disk or its server failed",
    errno.ESTALE: "the file server was restarted",
    errno.ETIMEDOUT: "no answer in time",
    errno.ENOTCONN: "no connection to the file server",
    errno.EBUSY: "another process uses it",
    errno.EAGAIN: "temporarily unavailable",
    errno.ENOMEM: "no memory is left",
    errno.EMFILE: "too many files are open in this process",
    errno.ENFILE: "too many files are open on this machine",
    errno.EPIPE: "the other end is gone",
    errno.ECONNREFUSED: "nothing listens at that address",
    errno.ECONNRESET: "the connection was cut",
    errno.EHOSTUNREACH: "no route to that host",
    errno.ENETUNREACH: "no route to that network",
}
"""The best known errors that may go away: these are all that are not PERMANENT."""


def may_pass(error: BaseException) -> bool:
    """True for a failure that may go away. The kind of error decides, not the file."""
    return isinstance(error, TransientError) or (isinstance(error, OSError) and error.errno not in PERMANENT)


def of_nature(error: BaseException, message: str) -> UserError:
    """A TransientError with `message` if `error` may go away, else a UserError."""
    return (TransientError if may_pass(error) else UserError)(message)


# The words of Python, torch, CUDA, C++'s new, the loader of libraries, NumPy, and of threads that get no stack.
_NO_MEMORY = re.compile(
    r"can(no|')t allocate memory|out of memory|bad_alloc|failed to map segment|unable to allocate"
    r"|can't start new thread|not enough memory",
    re.IGNORECASE,
)


def out_of_memory(error: BaseException) -> str | None:
    """One line if an error of Python or of a library means that no memory is left; None for any other."""
    text = " ".join(str(error).split())
    if not isinstance(error, MemoryError) and not _NO_MEMORY.search(text):
        return None
    return f"out of memory ({text[:300] or 'no further word'})"
