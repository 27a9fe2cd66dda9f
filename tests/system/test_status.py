"""launch.status over a real run's folder, and over copies of it: going on, hung, ended in every way, damaged."""

from __future__ import annotations

import json
import random
import secrets
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launch.config import StatusConfig
from launch.status.report import gather
from launch.status.table import show, status
from launch.status.text import harmless
from tests.helpers.ranks import ROOT
from tests.helpers.seeds import seeded
from tests.system.runs import TINY, make_data
from trainer.run.journal import read_journal

STEPS = 8
LIVES = '{"time": 1, "event": "start", "exit_code": null, "step": -1}\n'


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight steps under the supervisor; nobody writes into it."""
    root = tmp_path_factory.mktemp("status")
    how = [*TINY, f"run.dir={root / 'run'}", f"data.path={make_data(root / 'data')}", f"max_steps={STEPS}"]
    train = [sys.executable, "-m", "trainer.pretrain", *how, "log_every=1", "eval.every=4"]
    argv = [sys.executable, "-m", "launch.supervise", f"run.dir={root / 'run'}", "--", *train]
    subprocess.run(argv, cwd=ROOT, check=True, capture_output=True, timeout=200)
    return root / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def going(run: Path) -> Path:
    """The same as if it were still on its way: more steps are asked for and nothing has told of an end."""
    config = (run / "config.yaml").read_text()
    assert f"max_steps: {STEPS}\n" in config
    (run / "config.yaml").write_text(config.replace(f"max_steps: {STEPS}\n", "max_steps: 100\n"))
    (run / "supervise.jsonl").write_text(LIVES)
    shutil.rmtree(run / "heartbeats", ignore_errors=True)
    return run


def beat(root: Path, rank: int, age: float = 1.0, **changes: Any) -> None:
    now = time.time()
    body = {
        "rank": rank,
        "host": f"n{rank}",
        "pid": 1,
        "generation": 1,
        "time": now - age,
        "step": STEPS,
        "phase": "step",
        "since": now - age - 1,
        "step_s": 0.5,
        "own_s": 0.1 + rank,
    }
    (root / "heartbeats").mkdir(exist_ok=True)
    (root / f"heartbeats/rank-{rank:05d}.json").write_text(json.dumps(body | changes))


def supervised(root: Path, *rows: dict[str, Any]) -> None:
    with (root / "supervise.jsonl").open("a") as f:
        f.writelines(json.dumps({"time": time.time(), "step": STEPS} | row) + "\n" for row in rows)


def told(root: Path) -> tuple[str, str]:
    """The state, and everything that is printed."""
    report = gather(root, time.time())
    json.dumps(report, allow_nan=False)
    return report["state"]["state"], "\n".join(show(report))


def test_a_finished_run_is_reported_from_its_own_files(finished: Path) -> None:
    """The report agrees with the journal and the checkpoints."""
    state, text = told(finished)
    last, best = read_journal(finished / "metrics.jsonl")[-1].metrics, "step-00000008.gen-0001"
    assert state == "done"
    assert f"step 8/8  loss {last['train/loss']:.4f}" in text and "eta 0s" in text
    assert f"validation: loss {last['val/loss']:.4f} at step 8" in text
    assert f"checkpoint: {best}, " in text and f"best checkpoint: {best}" in text and "2 published" in text
    assert "starts: 1," in text and "exit at step 8, exit code 0, ended well" in text


def test_it_needs_no_torch_and_changes_nothing(finished: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    code = "import sys\nfrom launch.config import StatusConfig\nfrom launch.status.table import status\n" + (
        f"status(StatusConfig(run_dir={str(finished)!r}, json=True))\n"
        "sys.exit(bool({'torch', 'mlflow', 'deepspeed'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["state"]["state"] == "done"
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*")} == before


def test_a_missing_folder_is_a_mistake(tmp_path: Path) -> None:
    """A run in an empty folder was never started."""
    argv = [sys.executable, "-m", "launch.status"]
    wrong = subprocess.run(
        [*argv, f"run_dir={tmp_path / 'none'}"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert (wrong.returncode, wrong.stderr) == (2, f"error: run_dir={tmp_path / 'none'}: no such folder\n")
    assert told(tmp_path)[0] == "never started"
    (tmp_path / "submit/0001").mkdir(parents=True)
    (tmp_path / "submit/0001/code.json").write_text('{"commit": "abc", "dirty": true}')
    state, text = told(tmp_path)
    assert state == "never started"
    assert "submission 0001: commit abc, with changes that are not committed" in text


@pytest.mark.parametrize(
    ("phases", "state"),
    [
        (["step", "step"], "training"),
        (["validate", "step"], "training"),
        (["step", "save"], "saving"),
        (["start", "start"], "starting"),
    ],
)
def test_each_rank_has_its_phase_and_the_slowest_is_named(going: Path, phases: list[str], state: str) -> None:
    for rank, phase in enumerate(phases):
        beat(going, rank, phase=phase)
    found, text = told(going)
    assert found == state
    assert "2 ranks beat" in text and "slowest: rank 1 on n1, 1.100 s of its own a step" in text
    assert "eta " in text and "step 8/100" in text


def test_a_silent_rank_is_named_and_one_stuck_in_a_step_is_hung(going: Path) -> None:
    beat(going, 0)
    beat(going, 1, age=500)
    state, text = told(going)
    assert state == "no heartbeat for 500 s" and "from rank 1 on n1;" in text
    beat(going, 1, since=time.time() - 300)
    state, text = told(going)
    assert state == "hung" and "rank 1 on n1 has been in step 8 for 299 s" in text
    beat(going, 1)
    (going / "hangs/gen-0001").mkdir(parents=True)
    (going / "hangs/gen-0001/report.txt").write_text("no step for 130 s\nrank 1 sleeps\n")
    state, text = told(going)
    assert state == "hung" and "  no step for 130 s\n  rank 1 sleeps" in text


@pytest.mark.parametrize(
    ("code", "event", "state", "word"),
    [
        (85, "exit", "stopped by a signal", "85, preempted"),
        (143, "exit", "stopped by a signal", "143, saved and stopped on SIGTERM"),
        (86, "exit", "hung", "86, hung"),
        (2, "exit", "failed", "2, a mistake"),
        (137, "give up", "failed", "137, killed by SIGKILL"),
        (1, "restart", "starting", "exit code 1: "),
    ],
)
def test_an_end_is_told_with_its_exit_code_and_cause(going: Path, code: int, event: str, state: str, word: str) -> None:
    beat(going, 0, age=3)
    cause = f"cause {secrets.token_hex(4)}"
    supervised(going, {"event": "exit", "exit_code": code, "cause": cause})
    if event != "exit":
        supervised(going, {"event": event, "exit_code": code, "wait_s": 2.0})
    found, text = told(going)
    assert found == state
    assert word in text and cause in text
    supervised(going, {"event": "start", "exit_code": None})
    assert told(going)[0] == "starting"
    beat(going, 0, age=0)
    assert told(going)[0] == "training"  # what ended has begun again


def test_a_supervisor_that_died_in_its_back_off_is_reported(going: Path) -> None:
    """The run's state is not `starting` for ever."""
    beat(going, 0, age=9000)
    supervised(going, {"event": "exit", "exit_code": 1, "cause": "x", "time": time.time() - 8001})
    supervised(going, {"event": "restart", "exit_code": 1, "wait_s": 2.0, "time": time.time() - 8000})
    state, text = told(going)
    assert state == "no start for 8000 s" and "was to start it again after 2 s and has not" in text


def test_an_early_end_without_supervisor_is_told_by_checkpoints(going: Path) -> None:
    (going / "supervise.jsonl").unlink()
    beat(going, 0, age=5000, phase="end")
    beat(going, 1, age=5001, phase="end")
    assert told(going)[0] == "stopped by a signal"
    beat(going, 0, age=5000, phase="end", step=STEPS + 1)
    assert told(going)[0] == "failed"


def test_a_launcher_with_an_exit_code_of_its_own_hides_nothing(going: Path) -> None:
    stopped = (
        "stopped by SIGUSR1 after step 8",
        "error: *** CANCELLED *** | 0: stopped by SIGTERM after step 8, saved x",
    )
    for cause, state in (*((text, "stopped by a signal") for text in stopped), ("hang: 130 s", "hung")):
        supervised(going, {"event": "exit", "exit_code": 1, "cause": f"{cause} | ChildFailedError"})
        assert told(going)[0] == state


def test_guard_events_lost_shards_and_rows_that_wait_are_told(going: Path) -> None:
    path = going / "checkpoints/step-00000008.gen-0001/state.json"
    state = json.loads(path.read_text())
    event = {"step": 7, "position": 48, "loss": None, "norm": 2.0, "why": "non-finite"}
    state["guard"] = {
        "recent": [],
        "events": [event | {"did": "skipped"}, event | {"did": "rolled back", "to": 4, "jumped": [32, 56]}],
    }
    state["data"]["ledger"][-1]["lost"] = {"shards": [2]}
    path.write_text(json.dumps(state))
    rows = (going / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    sent = {"uri": "http://x", "run_id": "r1", "offset": sum(map(len, rows[:-3])), "uuid": "u"}
    (going / "tracking.json").write_text(json.dumps(sent))
    text = told(going)[1]
    assert (
        "step 7: non-finite (loss not finite, norm 2), skipped" in text
        and "guard: 1 steps skipped, 1 rollbacks" in text
    )
    assert "rolled back to step 4, windows 32 to 56 jumped" in text
    assert "lost shards: shards 2" in text
    assert "mlflow: run r1 at http://x, 3 rows wait to be sent" in text


def test_a_later_start_supersedes_the_rows_that_it_does_again(going: Path) -> None:
    with (going / "metrics.jsonl").open("a") as f:
        f.write(json.dumps({"step": 4, "generation": 2, "time": 1, "metrics": {}, "resumed_at": 4}) + "\n")
    assert "step 4/100" in told(going)[1] and "at step 4" in told(going)[1]


def test_of_a_journal_of_any_size_the_end_is_read(going: Path) -> None:
    path = going / "metrics.jsonl"
    rows = path.read_bytes()
    with path.open("wb") as f:
        f.truncate(64 << 30)  # a hole, which takes no room
        f.seek(64 << 30)
        f.write(b"\n" + rows)
    started = time.monotonic()
    text = told(going)[1]
    assert "step 8/100  loss" in text
    assert time.monotonic() - started < 60


def test_clocks_that_disagree_are_told(going: Path) -> None:
    beat(going, 0, age=-90)
    assert "1m30s in the future (the clocks disagree)" in told(going)[1]


def test_what_others_wrote_cannot_steer_the_terminal(going: Path) -> None:
    evil = "\x1b[2J\x1b]0;owned\x07\r\nstate: done\u202e\x9b1m"
    beat(going, 0, host=evil)
    supervised(going, {"event": "exit", "exit_code": 1, "cause": evil})
    text = told(going)[1]
    assert all(c.isprintable() or c == "\n" for c in text)
    assert not any(line.startswith("state: done") for line in text.splitlines())
    assert harmless("a\tb\n") == "a\\tb\\n"


@pytest.mark.parametrize("how", ["cut", "noise", "gone", "folder", "object"])
def test_whatever_is_damaged_the_rest_is_shown(going: Path, how: str) -> None:
    seed = seeded()
    rng = random.Random(seed)
    beat(going, 0)
    beat(going, 1)
    (going / "submit/0001").mkdir(parents=True)
    (going / "submit/0001/code.json").write_text('{"commit": "abc", "dirty": false}')
    (going / "tracking.json").write_text('{"uri": "u", "run_id": "r", "offset": 0}')
    names = (
        "*.yaml",
        "*.jsonl",
        "tracking.json",
        "generations/*",
        "heartbeats/*",
        "submit/*/*",
        "checkpoints/*/s*.json",
    )
    files = [p for name in (*names, "checkpoints/latest") for p in sorted(going.glob(name))]
    assert len(files) >= 10
    for path in files:
        whole = path.read_bytes()
        path.unlink()
        if how == "folder":
            path.mkdir()
        elif how != "gone":
            damaged = {
                "cut": whole[: rng.randrange(len(whole))],
                "noise": bytes(rng.randrange(256) for _ in whole[:500]),
                "object": b'{"time": "x", "step": [], "metrics": {"train/loss": {}}, "event": 7, "generation": null}\n',
            }
            path.write_bytes(damaged[how])
        report = gather(going, time.time())
        lines = show(report)
        assert any(line.startswith("run: ") for line in lines), (seed, path, lines)
        assert len(lines) > 4, (seed, path, lines)
        if how in ("noise", "folder"):
            assert any("cannot be read" in line or "damaged" in line for line in lines), (seed, path, lines)
        if path.is_dir():
            path.rmdir()
        path.write_bytes(whole)
    assert told(going)[0] == "training", seed


def test_a_folder_of_runs_is_a_table(
    going: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run at work, two of a sweep in the queue and one that was never started; squeue is asked once for all."""
    root = going.parent
    beat(going, 0)
    for name, jobs, more in (("s-0", ["7"], {"folder": "/s"}), ("s-1", ["7"], {"folder": "/s"}), ("dry", [], {})):
        (root / name / "submit/0001").mkdir(parents=True)
        (root / name / "submit/0001/code.json").write_text(json.dumps({"commit": "abc", "dirty": False, **more}))
        if jobs:
            (root / name / "submit/0001/submitted.json").write_text(json.dumps({"jobs": jobs, "time": 1.0}))
    (root / "not a run").mkdir()
    rows = ("7|0|RUNNING|None", "7|1|PENDING|Resources", "70|N/A|RUNNING|None")
    (root / "squeue").write_text("#!/bin/sh\n" + "".join(f"echo '{row}'\n" for row in rows))
    (root / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(root))
    status(StatusConfig(run_dir=str(root)))
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["name", "job", "queue", "state", "step", "loss", "tokens/s", "eta"]
    of = {line.split()[0]: line.split() for line in lines}
    assert list(of) == ["dry", "run", "s-0", "s-1"]
    assert of["dry"][1:] == ["-", "-", "never", "started", "-", "-", "-", "-"]
    assert of["s-0"][1:3] == ["7_0", "RUNNING"] and of["s-1"][1:4] == ["7_1", "PENDING", "(Resources)"]
    last = read_journal(going / "metrics.jsonl")[-1].metrics
    assert of["run"][3:6] == ["training", "8/100", f"{last['train/loss']:.4f}"] and len(of["run"]) == 8
    status(StatusConfig(run_dir=str(root), json=True))
    told = json.loads(capsys.readouterr().out)
    assert [Path(run["run_dir"]).name for run in told["runs"]] == list(of)
