"""What runs in the sandbox can end itself, and nothing else."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from conf.errors import UserError
from data_pipeline.prepare.extract.sandbox import Failed, Sandbox

ROOT = Path(__file__).resolve().parents[5]
PLANTED = "tests.helpers.sandboxed:planted"


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    made = Sandbox(PLANTED, seconds=0.3, memory_gib=0.5)
    yield made
    made.close()


def outcome(sandbox: Sandbox, data: bytes, hint: str = "") -> str:
    try:
        return sandbox(data, hint)
    except Failed as why:
        return str(why)


def says(data: bytes, hint: str = "") -> str:
    return f"{data.hex()} {hint}"


BAD = {
    b"spin": "took too long",
    b"allocate": "took too much memory",
    b"raise": "the extractor failed",
    b"crash": "the extractor crashed",
    b"be killed": "the extractor was killed",
}


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.decode())
def test_what_fails_has_its_reason_and_costs_only_itself(bad: bytes, sandbox: Sandbox) -> None:
    calls = [b"a", bad, b"b", bad, b"c"]
    assert [outcome(sandbox, call) for call in calls] == [says(b"a"), BAD[bad], says(b"b"), BAD[bad], says(b"c")]


def test_what_hangs_without_working_is_ended_by_the_clock() -> None:
    sandbox = Sandbox(PLANTED, seconds=0.05, memory_gib=0.5)
    assert [outcome(sandbox, call) for call in (b"hang", b"a")] == ["took too long", says(b"a")]


def test_any_bytes_and_hints_go_through(sandbox: Sandbox) -> None:
    for size in (0, 1, 8, 1 << 16, (1 << 20) + 1):
        data = secrets.token_bytes(size)
        assert sandbox(data, "é\N{GRINNING FACE}") == says(data, "é\N{GRINNING FACE}")


def test_a_process_killed_from_outside_costs_no_document(sandbox: Sandbox, tmp_path: Path) -> None:
    killed = str(tmp_path / "killed")
    assert sandbox(b"be killed once", killed) == says(b"be killed once", killed)
    assert Path(killed).exists()
    assert sandbox.child is not None
    os.kill(sandbox.child.pid, signal.SIGKILL)  # between two calls
    assert sandbox(b"a") == says(b"a")


def test_the_reply_to_an_interrupted_call_goes_to_no_other(sandbox: Sandbox) -> None:
    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    sandbox(b"a")
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            sandbox(b"rest")
    finally:
        signal.signal(signal.SIGALRM, before)
    assert sandbox(b"b") == says(b"b")


def test_what_others_left_in_memory_fails_nobody(sandbox: Sandbox) -> None:
    assert [sandbox(b"leak") for _ in range(7)] == [says(b"leak")] * 7  # three fit into half a GiB


def test_what_a_library_prints_is_no_reply(sandbox: Sandbox) -> None:
    assert [sandbox(b"print"), sandbox(b"a")] == [says(b"print"), says(b"a")]


def test_a_copy_has_a_process_of_its_own(sandbox: Sandbox) -> None:
    sandbox(b"a")
    for other in (copy.deepcopy(sandbox), pickle.loads(pickle.dumps(sandbox))):
        assert other(b"b") == says(b"b")
        assert other.child.pid != sandbox.child.pid  # type: ignore[union-attr]
        other.close()


def test_what_does_not_start_says_why_in_one_line() -> None:
    with pytest.raises(UserError, match=r"^the extractor does not start: No module named 'planted'.*gradus\[corpus\]"):
        Sandbox("tests.helpers.sandboxed:missing", 1, 1)(b"a")
    with pytest.raises(UserError, match=r"limits\.memory_gib=1e-05$"):
        Sandbox(PLANTED, 1, 0.00001)(b"a")


def gone(pid: int) -> bool:
    """It has ended; nobody may have asked for its exit code yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 60
    while not gone(pid):
        assert time.monotonic() < deadline, f"process {pid} still runs"
        time.sleep(0.01)


OWNER = """
import sys
from data_pipeline.prepare.extract.sandbox import Sandbox
sandbox = Sandbox("tests.helpers.sandboxed:planted", 0.5, 1)
sandbox(b"a")
print(sandbox.child.pid, flush=True)
sandbox(b"spin") if sys.argv[1] == "busy" else input()
"""


@pytest.mark.parametrize("doing", ["idle", "busy"])
def test_the_process_ends_when_its_owner_is_killed(doing: str) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, doing], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        assert not gone(pid)
        owner.kill()
    wait_until_gone(pid)


def test_no_process_outlives_its_sandbox() -> None:
    sandbox = Sandbox(PLANTED, 1, 1)
    sandbox(b"a")
    assert sandbox.child is not None
    pid = sandbox.child.pid
    del sandbox
    assert gone(pid)


def in_worker(data: bytes) -> str:
    assert multiprocessing.current_process().daemon
    return Sandbox(PLANTED, 1, 1)(data)


def test_a_daemonic_worker_can_start_a_sandbox() -> None:
    """A sandbox starts in a daemonic worker, which may have no children of multiprocessing."""
    with multiprocessing.get_context("forkserver").Pool(1) as pool:
        assert pool.map(in_worker, [b"a", b"b"]) == [says(b"a"), says(b"b")]
