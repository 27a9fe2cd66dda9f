"""Each check of the login node is brought to ok, warn and fail by what it looks at, not by a stand-in for it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launch.checks import folder, hosts, packages, services, slurm
from launch.checks.runner import Check, run_checks
from tests.helpers.http_server import serving, wait_for
from tests.helpers.ranks import ROOT
from trainer.config.tracking import TrackerName, TrackingConfig
from trainer.diagnostics import machine
from trainer.diagnostics.check_result import MAX_CHARS, CheckResult, State, fail, ok

NEVER = "doctor-has-no-such-package"


def states(findings: list[CheckResult] | Iterator[CheckResult]) -> dict[str, str]:
    return {finding.name: finding.state.value for finding in findings}


@contextmanager
def tmpfs(path: Path, options: str) -> Iterator[Path]:
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def can_mount() -> bool:
    """A container's root may be refused it: unshare asks the kernel."""
    return os.geteuid() == 0 and subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode == 0


needs_mount = pytest.mark.skipif(not can_mount(), reason="mounting a tmpfs takes root")


# --- side by side


def test_each_check_has_its_own_limit_and_its_own_failure(tmp_path: Path) -> None:
    def hang() -> list[CheckResult]:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen(["sleep", "1000"])
        (tmp_path / "pid").write_text(str(child.pid))
        child.wait()
        return []

    def broken() -> list[CheckResult]:
        raise ZeroDivisionError("a bug")

    def killed() -> list[CheckResult]:
        os.kill(os.getpid(), signal.SIGKILL)
        return []

    two = [ok("one", "1"), fail("two", "2", "fix it")]
    checks = [Check("hang", hang, 2.0, "wake it"), Check("broken", broken, 20), Check("killed", killed, 20)]
    begin = time.monotonic()
    found = run_checks([*checks, Check("fine", lambda: two, 20)])
    assert time.monotonic() - begin < 20  # the limits of the others are not waited for
    assert found[0] == fail("hang", "no answer within 2 s", "wake it")
    assert "ZeroDivisionError: a bug" in found[1].text and "died" in found[2].text
    assert found[3:] == two
    assert states(found[:3]) == {"hang": "fail", "broken": "fail", "killed": "fail"}
    stat = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")  # what the check had started is gone too
    assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] in "ZX"


def test_sigterm_ends_what_the_doctor_started(tmp_path: Path) -> None:
    (tmp_path / "ssh").write_text(
        f"#!/bin/sh\necho $$ > {tmp_path}/new; mv {tmp_path}/new {tmp_path}/pid; exec sleep 999\n"
    )
    (tmp_path / "ssh").chmod(0o755)
    argv = [sys.executable, "-m", "launch.doctor", "cluster=ssh", "cluster.ssh.hosts=[h1]", f"run.dir={tmp_path}/run"]
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    doctor = subprocess.Popen(argv, cwd=ROOT, env=env, stdout=subprocess.DEVNULL)
    wait_for((tmp_path / "pid").exists, 60)
    doctor.send_signal(signal.SIGTERM)
    assert doctor.wait(60) == 143
    stat = Path(f"/proc/{int((tmp_path / 'pid').read_text())}/stat")
    assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] in "ZX"


def test_what_another_machine_says_is_one_line_and_bounded() -> None:
    found = ok("x", "a\x1b[31mred\n\x00" + "b" * 10_000).text
    assert found.startswith("a?[31mred ?bbb") and len(found) <= MAX_CHARS + 1 and "\n" not in found


# --- packages and checkout


def project(root: Path, needs: list[str], pins: dict[str, str]) -> Path:
    root.mkdir(exist_ok=True)
    (root / "pyproject.toml").write_text(
        f'[project]\nrequires-python = ">=3.11"\ndependencies = {json.dumps(needs)}\n'
        f'[project.optional-dependencies]\ntracking = ["{NEVER}>=1"]\n'
    )
    (root / "constraints.txt").write_text("# pins\n" + "".join(f"{k}=={v}\n" for k, v in pins.items()))
    return root


def test_packages_are_held_against_pyproject_and_constraints(tmp_path: Path) -> None:
    from importlib.metadata import version

    hydra = version("hydra-core")
    good = project(tmp_path / "p", ["hydra-core~=1.3", f"{NEVER}; python_version < '3'"], {"hydra-core": hydra})
    assert states(packages.packages(good, ())) == {"packages": "ok", "tested versions": "ok"}
    [without, _] = packages.packages(good, ("tracking",))
    assert without.state is State.fail and NEVER in without.text and "[tracking]" in without.cure
    other = project(tmp_path / "p", ["hydra-core>=1"], {"hydra-core": "1.0.99"})
    [_, pinned] = packages.packages(other, ())
    assert pinned.state is State.warn and f"hydra-core {hydra} (tested: 1.0.99)" in pinned.text
    old = project(tmp_path / "p", ["hydra-core>=99"], {})
    [needed] = packages.packages(old, ())
    assert needed.state is State.fail and f"hydra-core is {hydra}, not >=99" in needed.text
    assert states(packages.packages(ROOT, ("tracking",)))["packages"] == "ok"


def test_python_is_held_against_what_the_project_needs(tmp_path: Path) -> None:
    assert packages.python_version(ROOT).state is State.ok
    (tmp_path / "pyproject.toml").write_text('[project]\nrequires-python = ">=4"\n')
    found = packages.python_version(tmp_path)
    assert found.state is State.fail and ">=4" in found.text


def test_a_checkout_with_changes_has_no_name(tmp_path: Path) -> None:
    assert packages.checkout(tmp_path).state is State.ok  # none at all
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    (tmp_path / "a b").write_text("1")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True)
    clean = packages.checkout(tmp_path)
    assert clean.state is State.ok and "nothing changed" in clean.text
    (tmp_path / "a b").write_text("2")
    dirty = packages.checkout(tmp_path)
    assert dirty.state is State.warn and "1 changed files" in dirty.text and "a b" in dirty.text


# --- this machine


def test_shared_memory_wants_a_gibibyte(tmp_path: Path) -> None:
    assert machine.shared_memory(tmp_path / "absent").state is State.fail


@needs_mount
def test_shared_memory_by_the_size_of_a_real_one(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "small", "size=64m") as small:
        found = machine.shared_memory(small)
        assert found.state is State.warn and "0.06 GiB" in found.text and "size=1G" in found.cure
    with tmpfs(tmp_path / "big", "size=1g") as big:
        assert machine.shared_memory(big).state is State.ok
        (big / "left").write_bytes(bytes(1 << 20))
        found = machine.shared_memory(big)
        assert found.state is State.warn and "delete" in found.cure


LIMITS = """
import resource, sys
from pathlib import Path
from trainer.diagnostics.machine import locked_memory, open_files
which, soft, infiniband = sys.argv[1:]
limit = getattr(resource, which)
resource.setrlimit(limit, (int(soft), resource.getrlimit(limit)[1]))
print(open_files().state.value, locked_memory(Path(infiniband)).state.value)
"""


def limited(which: str, soft: int, infiniband: Path) -> list[str]:
    argv = [sys.executable, "-c", LIMITS, which, str(soft), str(infiniband)]
    return subprocess.run(argv, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()


def test_limits_of_open_files_and_locked_memory(tmp_path: Path) -> None:
    (tmp_path / "infiniband" / "mlx5_0").mkdir(parents=True)
    assert limited("RLIMIT_NOFILE", 256, tmp_path / "absent") == ["warn", "ok"]
    assert limited("RLIMIT_NOFILE", 4096, tmp_path / "absent") == ["ok", "ok"]
    assert limited("RLIMIT_MEMLOCK", 1 << 16, tmp_path / "infiniband")[1] == "fail"
    assert limited("RLIMIT_MEMLOCK", 1 << 16, tmp_path / "absent")[1] == "ok"


# --- the run folder


def test_a_run_folder_that_can_be_used_is_left_as_it_was(tmp_path: Path) -> None:
    theirs = tmp_path / ".doctor-notes/final/old"  # a name as the probe's, which is another
    theirs.parent.mkdir(parents=True)
    theirs.write_text("years")
    found = states(folder.run_folder(tmp_path / "runs" / "new", 1000, 1))
    assert found["run.dir"] == found["run.dir space"] == found["run.dir operations"] == found["run.dir locks"] == "ok"
    assert set(found) >= {"run.dir speed", "run.dir file system"}
    assert [path.name for path in tmp_path.iterdir()] == [".doctor-notes"] and theirs.read_text() == "years"


def test_a_run_folder_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    [found] = folder.run_folder(tmp_path / "file" / "run", None, 1)
    assert found.state is State.fail and "Not a directory" in found.text


def test_room_is_held_against_what_the_checkpoints_take(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    assert folder.space(tmp_path, free // 4).state is State.ok
    assert folder.space(tmp_path, free * 3 // 4).state is State.warn
    assert folder.space(tmp_path, free * 4).state is State.fail


def test_a_slow_folder_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, state in ((0.001, State.ok), (1e12, State.warn)):
        monkeypatch.setattr(folder, "SLOW_MB_S", limit)
        assert folder.speed(tmp_path).state is state


@needs_mount
def test_a_run_folder_in_memory_full_or_read_only(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "memory", "size=16m") as memory:
        found = states(folder.run_folder(memory / "run", None, 1))
        assert found["run.dir file system"] == "warn" and found["run.dir space"] == "warn"
        assert found["run.dir speed"] == "fail"  # there is no room for what is written
        subprocess.run(["mount", "-o", "remount,ro", str(memory)], check=True)
        [found_ro] = folder.run_folder(memory / "run", None, 1)
        assert found_ro.state is State.fail and "Read-only" in found_ro.text


def test_a_disk_of_one_machine_is_no_place_for_a_run_of_several(tmp_path: Path) -> None:
    at = tmp_path / "a b"
    at.mkdir()
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/sda1 / ext4 rw 0 0\nserver:/x {str(at).replace(' ', chr(92) + '040')} nfs4 rw 0 0\n")
    assert folder.mounted(at, mounts) == ("nfs4", str(at))
    assert folder.file_system(at, 2, mounts).state is State.ok
    assert folder.file_system(tmp_path, 2, mounts).state is State.warn
    assert folder.file_system(tmp_path, 1, mounts).state is State.ok


# --- the tracker


def tracked(uri: str) -> CheckResult:
    return services.tracking(TrackingConfig(TrackerName.mlflow, uri), Path("runs/a"))


def test_a_server_answers_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import version

    monkeypatch.setattr(services, "ANSWER_S", 1.0)
    (tmp_path / "health").write_text("OK")
    (tmp_path / "version").write_text(version("mlflow"))
    with serving(tmp_path) as server:
        assert tracked(server.url).state is State.ok
        (tmp_path / "version").write_text("1.30.0")
        assert tracked(server.url).state is State.warn
        server.always("health", "401")
        found = tracked(server.url)
        assert found.state is State.fail and "401" in found.text and "MLFLOW_TRACKING_USERNAME" in found.cure
        server.always("health", "hang")
        found = tracked(server.url)
        assert found.state is State.fail and "timed out" in found.text
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, and nobody listens
        found = tracked(f"http://127.0.0.1:{closed.getsockname()[1]}")
        assert found.state is State.fail and "refused" in found.text
    secret = tracked("http://me:hunter2@127.0.0.1:1")
    assert secret.state is State.fail and "hunter2" not in str(secret)
    assert services.tracking(TrackingConfig(TrackerName.none), Path("runs/a")).state is State.ok


def test_a_database_can_be_written_or_not(tmp_path: Path) -> None:
    path = tmp_path / "sub dir" / "mlflow.db"
    assert tracked(f"sqlite:///{path}").state is State.ok  # to be made
    path.parent.mkdir()
    path.write_text("no database, and longer than its head would be" * 10)
    assert tracked(f"sqlite:///{path}").state is State.fail
    path.unlink()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE a (b)")
    assert tracked(f"sqlite:///{path}").state is State.ok
    connection.execute("BEGIN EXCLUSIVE")
    found = tracked(f"sqlite:///{path}")
    assert found.state is State.fail and "locked" in found.text
    connection.close()
    assert tracked(f"sqlite:///{path}/below/mlflow.db").state is State.fail


# --- Slurm


def test_without_slurm_in_the_path_its_commands_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = slurm.commands()
    assert found.state is State.fail and "sbatch, srun, scontrol, sinfo" in found.text


def test_a_partition_without_a_limit_lets_a_job_run_for_ever() -> None:
    assert [slurm.limit_of(t) for t in ("infinite", "n/a", "1-00:00:00")] == [float("inf"), float("inf"), 86400]


def test_gpus_of_a_node_by_slurms_words() -> None:
    assert [slurm.gpus_of(g) for g in ("(null)", "gpu:8", "gpu:h100:4(S:0-1)", "gpu:a:1,gpu:b:2", "shard:9")] == [
        0,
        8,
        4,
        3,
        0,
    ]


# --- the command


def doctor(*words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "launch.doctor", *words]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=200)


def test_the_command_says_what_fails_and_how_it_ends(tmp_path: Path) -> None:
    good = doctor(f"run.dir={tmp_path / 'runs'}", "json=true")
    body = json.loads(good.stdout)
    assert good.returncode == (not body["ok"]) and {f["name"] for f in body["findings"]} >= {"python", "run.dir"}
    (tmp_path / "file").write_text("x")
    bad = doctor(f"run.dir={tmp_path / 'file'}", f"data.path={tmp_path / 'absent'}")
    assert bad.returncode == 1 and bad.stderr == ""
    assert [line for line in bad.stdout.splitlines() if line.startswith("fail  run.dir: ")]
    assert [line for line in bad.stdout.splitlines() if line.startswith("fail  data: ") and "absent" in line]
    wrong = doctor("data.path=x", "--", "max_steps=10")
    assert wrong.returncode == 2 and "data.path=x: a run is given" in wrong.stderr


# --- hosts


def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> CheckResult:
    """What is found of a host whose ssh is `body`, a shell script that gets the command as "$last"."""
    program = tmp_path / "ssh"
    program.write_text(f"#!/bin/sh\nfor last; do :; done\n{body}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return hosts.reachable("h1", ROOT)


def test_a_host_with_the_same_python_code_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = ssh(tmp_path, monkeypatch, 'sh -c "$last"')
    assert found.state is State.ok and "same Python and code" in found.text


def test_a_host_whose_clock_is_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text("import time\ntrue = time.time\ntime.time = lambda: true() - 77\n")
    found = ssh(tmp_path, monkeypatch, f'PYTHONPATH={tmp_path} sh -c "$last"')
    assert found.state is State.warn and "clock -7" in found.text and "NTP" in found.cure


def test_a_host_with_another_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = ssh(
        tmp_path, monkeypatch, f'cd / && sh -c "$(echo "$last" | sed "s, {ROOT}$, /,")"'
    )  # the last word: the interpreter may lie in it
    assert found.state is State.fail and "commit None, here" in found.text


@pytest.mark.parametrize(
    ("body", "words", "cure"),
    [
        ("echo 'h1: Permission denied (publickey).' >&2; exit 255", "Permission denied", "ssh-copy-id"),
        ("echo 'sh: 1: python: not found' >&2; exit 127", "not found", "the same Python"),
        ("echo '[]'; read x; echo '{\"time\": 1}'", "no answer", "ssh-copy-id"),
        ("exit 0", "no answer", "ssh-copy-id"),
    ],
)
def test_a_host_that_does_not_do_what_it_must(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, words: str, cure: str
) -> None:
    found = ssh(tmp_path, monkeypatch, body)
    assert found.state is State.fail and words in found.text and cure in found.cure
