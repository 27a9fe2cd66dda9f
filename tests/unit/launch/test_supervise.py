"""The supervisor, against real processes that crash, hang and leave orphans."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.supervise import cause, judged, outcome, rank_exit_code
from tests.helpers.ranks import ROOT

PUBLISH = """
import sys
from trainer.run.folder import RunFolder
folder = RunFolder(sys.argv[1])
generation = folder.take_generation()
latest = folder.latest()
step = int(latest.name[5:13]) + 100 if latest else 100
"""


def argv(root: Path, *command: str, **settings: float) -> list[str]:
    given = {"backoff_s": 0.05, "grace_s": 5, **settings}
    values = [f"{k}={v}" for k, v in given.items()]
    return [sys.executable, "-m", "launch.supervise", f"run.dir={root}", *values, "--", *command]


def supervise(root: Path, *command: str, **settings: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv(root, *command, **settings), cwd=ROOT, capture_output=True, text=True, timeout=300)


def events(root: Path) -> list[tuple[str, int | None, int]]:
    rows = [json.loads(line) for line in (root / "supervise.jsonl").read_text().splitlines()]
    assert all(abs(row["time"] - time.time()) < 600 for row in rows)
    return [(row["event"], row["exit_code"], row["step"]) for row in rows]


def wait_for(what: Path) -> str:
    deadline = time.monotonic() + 30
    while not (what.exists() and what.read_text().endswith("\n")):
        assert time.monotonic() < deadline, f"{what} does not come"
        time.sleep(0.02)
    return what.read_text()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_success_is_passed_on_and_nothing_restarted(tmp_path: Path) -> None:
    done = supervise(tmp_path / "run", "bash", "-c", "echo out; echo err >&2")
    assert (done.returncode, done.stdout) == (0, "out\n")
    assert "err\n" in done.stderr
    assert events(tmp_path / "run") == [("start", None, -1), ("exit", 0, -1)]


def test_users_mistake_is_not_retried(tmp_path: Path) -> None:
    assert supervise(tmp_path, "bash", "-c", "exit 2").returncode == 2
    assert [e[0] for e in events(tmp_path)] == ["start", "exit"]


def test_crash_loop_ends_with_the_first_cause_in_one_line(tmp_path: Path) -> None:
    script = (
        f"n=$(cat {tmp_path}/n 2>/dev/null || echo 1); echo $((n+1)) > {tmp_path}/n; echo cause $n >&2; exit $((n+6))"
    )
    done = supervise(tmp_path, "bash", "-c", script, max_restarts=2)
    assert done.returncode == 9
    last = done.stderr.splitlines()[-1]
    assert last == (
        "error: 3 failures after step 0 without a new checkpoint (max_restarts=2); the first: exit code 7: cause 1"
    )
    assert [e[:2] for e in events(tmp_path) if e[0] == "exit"] == [("exit", 7), ("exit", 8), ("exit", 9)]


def test_failures_between_new_checkpoints_are_not_counted(tmp_path: Path) -> None:
    """Five failures with max_restarts=1: each start published a checkpoint, until the sixth succeeds."""
    program = PUBLISH + (
        "aside = folder.staging(step, generation)\n"
        "aside.mkdir()\n"
        "folder.publish(aside, step, generation)\n"
        "sys.exit(0 if step == 600 else 1)\n"
    )
    done = supervise(tmp_path, sys.executable, "-c", program, str(tmp_path), max_restarts=1)
    assert done.returncode == 0, done.stderr
    exits = [(code, step) for event, code, step in events(tmp_path) if event == "exit"]
    assert exits == [(1, 100), (1, 200), (1, 300), (1, 400), (1, 500), (0, 600)]


def test_no_process_of_a_failed_start_lives_on(tmp_path: Path) -> None:
    """Neither a deaf one in the group nor an orphan in a session of its own, both deaf to SIGTERM."""
    deaf = f"trap '' TERM; echo $BASHPID >> {tmp_path}/pids; while true; do sleep 0.1; done"
    up = f"for i in {{1..300}}; do [ $(wc -l < {tmp_path}/pids) -ge $want ] && break; sleep 0.1; done"
    want = f"touch {tmp_path}/pids; want=$(($(wc -l < {tmp_path}/pids) + 2))"
    script = f'{want}; ({deaf}) & setsid bash -c "{deaf.replace("$", chr(92) + "$")}" & {up}; exit 1'
    done = supervise(tmp_path, "bash", "-c", script, max_restarts=1, grace_s=0.3)
    assert done.returncode == 1
    pids = [int(p) for p in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 4
    assert [p for p in pids if is_running(p)] == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_reaches_the_command_which_is_not_restarted(tmp_path: Path, number: int) -> None:
    save = f"trap 'echo saved > {tmp_path}/saved; exit 5' INT TERM USR1"
    script = f"{save}; echo up > {tmp_path}/up; while true; do sleep 0.05; done"
    process = subprocess.Popen(argv(tmp_path, "bash", "-c", script), cwd=ROOT, stderr=subprocess.DEVNULL)
    wait_for(tmp_path / "up")
    process.send_signal(number)
    assert process.wait(20) == (85 if number == signal.SIGUSR1 else 5)
    assert (tmp_path / "saved").exists()
    assert [e[0] for e in events(tmp_path)][:2] == ["start", "exit"] and "restart" not in str(events(tmp_path))


def test_a_sigusr1_that_came_too_early_is_sent_again(tmp_path: Path) -> None:
    """The command was not ready for the first one."""
    up = f"echo up > {tmp_path}/up"
    script = f"trap '' USR1; {up}; sleep 1; trap 'exit 5' USR1; while true; do sleep 0.05; done"
    process = subprocess.Popen(argv(tmp_path, "bash", "-c", script), cwd=ROOT, stderr=subprocess.DEVNULL)
    wait_for(tmp_path / "up")
    process.send_signal(signal.SIGUSR1)
    assert process.wait(40) == 85


def test_a_signal_during_the_pause_ends_it(tmp_path: Path) -> None:
    command = argv(tmp_path, "bash", "-c", "exit 3", backoff_s=50)
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    while "restart" not in process.stderr.readline():
        pass
    process.terminate()
    assert process.wait(20) == 3


def test_what_cannot_run_is_refused_in_one_line(tmp_path: Path) -> None:
    for settings, message in (
        ([f"run.dir={tmp_path}"], "what to run is not given"),
        ([f"run.dir={tmp_path}", "--", "no-such-program"], "no-such-program cannot be started"),
        ([f"run.dir={tmp_path}", "max_restarts=-1", "--", "true"], "max_restarts=-1"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "launch.supervise", *settings], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1].startswith("error: ")
        assert message in done.stderr.splitlines()[-1]


def test_supervising_needs_no_torch() -> None:
    code = "import sys, launch.supervise; sys.exit('torch' in sys.modules or 'deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_cause_names_the_first_error_and_the_last_lines() -> None:
    text = (
        "step 1\nTraceback\n  x\nValueError: the cause\nnoise\nRuntimeError: a peer is gone\n====\nlast but one\nlast\n"
    )
    assert cause(text) == "ValueError: the cause | RuntimeError: a peer is gone | last but one | last"
    assert cause("\r\n") == "nothing on stderr"
    cancelled = "slurmstepd-n1: error: *** STEP 1.0 ON n1 CANCELLED AT 2026-11-30 ***\n"
    cancelled += "1: stopped by SIGTERM after step 7, saved /x\n"
    cancelled += "srun: error: n2: task 1: Killed\nsrun: error: n1: task 0: Killed\n"
    assert cause(cancelled) == "1: stopped by SIGTERM after step 7, saved /x"
    assert [rank_exit_code(code, cancelled) for code in (0, 9, 137, 143)] == [0, 143, 143, 143]


def under_torchrun(tmp_path: Path, script: str) -> list[str]:
    """Two workers run a bash script; in a file, for torchrun would fill in its dollar signs."""
    (tmp_path / "worker.sh").write_text(script)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "--no-python"]
    return [*torchrun, "bash", str(tmp_path / "worker.sh")]


@pytest.mark.slow
def test_users_mistake_under_torchrun_is_not_retried(tmp_path: Path) -> None:
    done = subprocess.run(
        argv(tmp_path, *under_torchrun(tmp_path, "exit 2")), cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=200
    )
    assert done.returncode == 2
    assert [e[0] for e in events(tmp_path)] == ["start", "exit"], done.stderr


@pytest.mark.slow
def test_workers_of_a_killed_torchrun_end_before_the_restart(tmp_path: Path) -> None:
    """torchrun puts its workers into sessions of their own: killed with SIGKILL, it leaves them training."""
    pids, second = tmp_path / "pids", tmp_path / "second"
    script = f"[ -e {second} ] && exit 0\necho $$ >> {pids}\nexec sleep 300\n"
    process = subprocess.Popen(argv(tmp_path, *under_torchrun(tmp_path, script)), cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not pids.exists() or len(pids.read_text().split()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    workers = [int(p) for p in pids.read_text().split()]
    launcher = int(Path(f"/proc/{workers[0]}/stat").read_text().rpartition(")")[2].split()[1])
    second.touch()
    os.kill(launcher, signal.SIGKILL)
    assert process.wait(120) == 0
    assert [p for p in workers if is_running(p)] == []
    assert [e[0] for e in events(tmp_path)] == ["start", "exit", "restart", "start", "exit"]


@pytest.mark.parametrize("code", [2, 85, 86, 87, 130, 143])
def test_a_ranks_exit_code_is_found_in_torchruns_report(code: int) -> None:
    report = (
        "Other Failures:\n  exitcode  : 3 (pid: 5)\nRoot Cause (first observed failure):\n  exitcode  : {} (pid: 4)\n"
    )
    assert rank_exit_code(1, report.format(code)) == code
    assert (
        rank_exit_code(1, report.format(-9))
        == rank_exit_code(1, report.format(1))
        == rank_exit_code(1, f"exitcode : {code}")
        == 1
    )
    assert rank_exit_code(9, report.format(code)) == 9


def test_who_asked_says_how_a_failed_command_ends() -> None:
    usr1, term, interrupt = signal.SIGUSR1, signal.SIGTERM, signal.SIGINT
    for code, asked, expected in (
        (1, [], 1),
        (1, [usr1], 85),
        (138, [usr1], 85),
        (87, [usr1], 85),
        (0, [usr1], 0),
        (2, [usr1], 2),
        (1, [term], 143),
        (5, [term], 5),
        (1, [usr1, term], 143),
        (1, [interrupt], 130),
        (143, [interrupt], 130),
        (137, [interrupt], 137),
    ):
        assert outcome(code, list(asked)) == expected, (code, asked)


def test_a_preempted_command_is_not_restarted(tmp_path: Path) -> None:
    """The row of its exit gives the reason."""
    done = supervise(tmp_path, "bash", "-c", "echo stopped by SIGUSR1 after step 7 >&2; exit 85")
    assert done.returncode == 85
    rows = [json.loads(line) for line in (tmp_path / "supervise.jsonl").read_text().splitlines()]
    assert [(row["event"], row.get("cause")) for row in rows] == [
        ("start", None),
        ("exit", "stopped by SIGUSR1 after step 7"),
        ("stopped without a checkpoint", None),
    ]


def test_a_hangs_finding_is_the_cause(tmp_path: Path) -> None:
    program = PUBLISH + (
        "report = folder.hang_report(generation)\n"
        "report.parent.mkdir(parents=True)\n"
        "report.write_text('no step for 9 s: waiting for rank 1\\nmore\\n')\n"
        "sys.exit(86)\n"
    )
    done = supervise(tmp_path, sys.executable, "-c", program, str(tmp_path), max_restarts=0)
    assert done.returncode == 86
    assert done.stderr.splitlines()[-1].endswith("the first: exit code 86: no step for 9 s: waiting for rank 1")


SAVE = """
aside = folder.staging(step, generation)
aside.mkdir()
folder.publish(aside, step, generation)
"""


@pytest.mark.parametrize("code", [130, 143])
def test_a_command_that_others_told_to_end_is_not_restarted(tmp_path: Path, code: int) -> None:
    assert supervise(tmp_path, "bash", "-c", f"exit {code}").returncode == code
    assert [e[0] for e in events(tmp_path)] == ["start", "exit"]


def test_stops_without_a_new_checkpoint_come_to_an_end(tmp_path: Path) -> None:
    """As a job that requeues itself would: what is saved in between begins the count again."""
    stop, save = f"{PUBLISH}\nsys.exit(85)", f"{PUBLISH}\n{SAVE}\nsys.exit(85)"
    codes = []
    for program in (stop, stop, save, stop, stop, stop):
        done = supervise(tmp_path, sys.executable, "-c", program, str(tmp_path), max_restarts=2)
        codes.append(done.returncode)
    assert codes == [85, 85, 85, 85, 85, 1]
    assert done.stderr.splitlines()[-1].startswith(
        "error: stopped by SIGUSR1 3 times in a row after step 100 without a new checkpoint (max_restarts=2): "
    )


def test_whether_a_training_is_done_its_last_checkpoint_says(tmp_path: Path) -> None:
    """Of 300 steps, 100 in each start: the first ends with 0 all the same, the last one's launcher is killed."""
    ends = "sys.exit({100: 0, 200: 9, 300: 137}[step])"
    config = "(folder.root / 'config.yaml').write_text('max_steps: 300')"
    program = f"{PUBLISH}\n{config}\n{SAVE}\n{ends}"
    done = supervise(tmp_path, sys.executable, "-c", program, str(tmp_path), max_restarts=1)
    assert done.returncode == 0, done.stderr
    assert [(code, step) for event, code, step in events(tmp_path) if event == "exit"] == [(1, 100), (9, 200), (0, 300)]
    rows = [json.loads(line) for line in (tmp_path / "supervise.jsonl").read_text().splitlines()]
    causes = [row["cause"] for row in rows if row["event"] == "exit"]
    assert causes[0] == "exit code 0, but the latest checkpoint is of step 100 of 300: not done"
    assert causes[2].startswith("exit code 137 after the last of 300 steps was saved: the run is done")
    assert supervise(tmp_path, "bash", "-c", "exit 3", max_restarts=0).returncode == 3, "a command that trained nothing"


@pytest.mark.parametrize("code", [0, 137])
def test_a_training_that_ended_itself_is_not_started_again(tmp_path: Path, code: int) -> None:
    """Nor where its launcher was killed after that."""
    config = "(folder.root / 'config.yaml').write_text('max_steps: 300')"
    program = f"{PUBLISH}\n{config}\n{SAVE}\nfolder.note(generation, ended='max_hours=2: over')\nsys.exit({code})"
    done = supervise(tmp_path, sys.executable, "-c", program, str(tmp_path), max_restarts=1)
    assert done.returncode == 0, done.stderr
    assert events(tmp_path) == [("start", None, -1), ("exit", 0, 100)]
    row = json.loads((tmp_path / "supervise.jsonl").read_text().splitlines()[-1])
    assert row["cause"].startswith("max_hours=2: over" if code == 0 else "exit code 137 after it ended itself (max_hou")


def test_a_users_mistake_stays_one() -> None:
    """The exit code of a command that trains nothing is believed."""
    assert judged(2, "why", 300, 300) == (2, "why")
    assert judged(0, None, 100, None) == (0, None)
    assert judged(137, "why", 100, 300) == (137, "why")


@pytest.mark.parametrize(
    ("code", "ends", "expected"),
    [
        (137, ["task 1: Exited with exit code 2", "tasks 0,2-3: Killed"], 2),
        (143, ["task 1: Exited with exit code 1", "task 0: Exited with exit code 143"], 1),
        (137, ["task 1: Killed", "task 0: Exited with exit code 1"], 137),
        (139, ["task 0: Segmentation fault (core dumped)"], 139),
        (85, ["tasks 0-1: Exited with exit code 85"], 85),
    ],
)
def test_the_first_rank_that_srun_saw_end_says_why(code: int, ends: list[str], expected: int) -> None:
    said = "".join(f"srun: error: n[1-2]: {end}\n" for end in ends)
    assert rank_exit_code(code, f"step 1\nsrun: Job step aborted: Waiting\n{said}") == expected
    assert rank_exit_code(0, said) == 0
