"""Work on untrusted data in a process of its own: a bad page costs only itself.

The process limits itself, so that nobody has to watch it: each call gets CPU seconds (ITIMER_PROF), which do not depend
on the machine's load, and WAITING times as many by the clock, in case it hangs without working; all calls get memory
(RLIMIT_DATA). Past a limit the kernel ends it, even in the middle of C code. A process that failed is not used again.
If a process that had worked before failed, a fresh one decides, so that the result of a call does not depend on the
calls before it. The process ends when its owner is gone, however that ended, after the call that is running.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from importlib import import_module
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

from conf.errors import UserError

WAITING = 30  # times the CPU seconds, by the clock
READY = b""  # the first message of the process; any other one says what it lacks
NO_MEMORY, NO_RESULT = 65, 66  # exit codes
TOO_LONG = (-signal.SIGPROF, -signal.SIGALRM)
REASONS = {
    **dict.fromkeys(TOO_LONG, "took too long"),
    **dict.fromkeys((NO_MEMORY, -signal.SIGABRT), "took too much memory"),  # Rust and C++ abort when there is none left
    NO_RESULT: "the extractor failed",
    -signal.SIGKILL: "the extractor was killed",
}

KEPT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(64 << 20), "MALLOC_TRIM_THRESHOLD_": str(256 << 20)}
"""glibc: keep the memory of one page for the next, instead of giving it back and getting it again for each page."""


class Failed(Exception):
    """A call that gave no text; the message is one of REASONS, or that the process crashed."""


class Sandbox:
    """Calls a function of bytes and a hint, which gives text, in a process that starts with the first call.

    Args:
        target: module:factory; the factory is called in the process, without arguments, and gives the function.
        seconds: of CPU time, for each call.
        memory_gib: of the process.
    """

    def __init__(self, target: str, seconds: float, memory_gib: float) -> None:
        self.target = target
        self.seconds = seconds
        self.memory_gib = memory_gib
        self.child: subprocess.Popen[bytes] | None = None

    def __reduce__(self) -> tuple[type[Sandbox], tuple[str, float, float]]:
        return Sandbox, (self.target, self.seconds, self.memory_gib)  # a copy starts a process of its own

    def __call__(self, data: bytes, hint: str = "") -> str:
        """The function's text of `data`.

        Raises:
            Failed: it gives none; the reason does not depend on earlier calls.
            UserError: the process does not start.
        """
        used = self.child is not None
        reply, code = self._call(data, hint)
        if reply is None and code not in TOO_LONG and (used or code == -signal.SIGKILL):
            reply, code = self._call(data, hint)  # an earlier call may be the cause: a fresh process decides
        if reply is None:
            raise Failed(REASONS.get(code, "the extractor crashed"))
        return reply.decode()

    def _call(self, data: bytes, hint: str) -> tuple[bytes | None, int]:
        """The reply, or None and the exit code of the process."""
        child, reply = self.child or self._start(), None
        try:
            with contextlib.suppress(OSError, EOFError):  # it has ended
                self._connection.send_bytes(data)
                self._connection.send_bytes(hint.encode())
                reply = self._connection.recv_bytes()
            return reply, 0 if reply is not None else child.wait()
        finally:
            if reply is None:  # or this was interrupted: a late reply must not go to the next call
                self.close()

    def _start(self) -> subprocess.Popen[bytes]:
        self._connection, theirs = Pipe()
        limits = [str(self.seconds), str(int(self.memory_gib * 2**30))]
        argv = [sys.executable, "-P", "-m", __name__, self.target, *limits, str(theirs.fileno())]
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(p or str(Path.cwd()) for p in sys.path),
            "PYTHONHASHSEED": "0",
            **KEPT_MEMORY,
        }
        with theirs:
            self.child = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=env, pass_fds=[theirs.fileno()]
            )
        self._finalizer = weakref.finalize(self, end, self.child)
        message = b"it ended"
        with contextlib.suppress(OSError, EOFError):
            message = self._connection.recv_bytes()
        if message != READY:
            self.close()
            raise UserError(
                f"the extractor does not start: {message.decode()}: pip install 'gradus[corpus]', "
                f"or give it more than limits.memory_gib={self.memory_gib:g}"
            )
        return self.child

    def close(self) -> None:
        """End the process; the next call starts another."""
        if self.child is not None:
            self._finalizer()
            self.child = None


def end(child: subprocess.Popen[bytes]) -> None:
    with child:  # waits for it, which counts its CPU time too
        child.kill()


def serve(target: str, seconds: float, memory: int, owner: Connection) -> int:
    """Answer one call after the other; returns the exit code, 0 when there are no more."""
    for limit, value in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_DATA, memory)):
        resource.setrlimit(limit, (value, value))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the owner
    for number in (signal.SIGPROF, signal.SIGALRM, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)
    logging.disable()
    module, factory = target.split(":")
    try:
        function = getattr(import_module(module), factory)()
    except (ImportError, MemoryError) as e:
        owner.send_bytes(" ".join(str(e).split()).encode() or b"out of memory")
        return NO_RESULT
    owner.send_bytes(READY)
    os.dup2(1, 2)  # to nowhere, as a library's complaints about a bad page
    try:
        while True:
            try:
                data, hint = owner.recv_bytes(), owner.recv_bytes().decode()
            except EOFError:
                return 0
            owner.send_bytes(limited(function, data, hint, seconds).encode())
    except MemoryError:
        return NO_MEMORY
    except Exception:
        return NO_RESULT


def limited(function: Callable[[bytes, str], str], data: bytes, hint: str, seconds: float) -> str:
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, seconds * WAITING)
    text = function(data, hint)
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return text


if __name__ == "__main__":  # _exit: an orderly exit would save nothing
    os._exit(serve(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), Connection(int(sys.argv[4]))))
