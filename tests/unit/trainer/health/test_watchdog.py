"""The watch's rules, without a run: limits, places, reports, heartbeats, stragglers, signals."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from conf.errors import UserError
from tests.helpers.ranks import ROOT, free_port, rank_env
from tests.helpers.seeds import seeded
from trainer.config.health import WatchConfig
from trainer.health.hang_report import Spot, publish_report, read_spots, report, write_stacks
from trainer.health.stragglers import AGAIN_S, LONG_S, Stragglers
from trainer.health.watchdog import limit_s
from trainer.run.exit_codes import USER_ERROR
from trainer.run.folder import RunFolder
from trainer.run.heartbeat import Heartbeat, read_heartbeats, write_heartbeat
from trainer.run.owner import refuse_living
from trainer.run.progress import END, SAVE, START, STEP, VALIDATE, Progress
from trainer.run.signals import CODES, Signals, agreed
from trainer.run.stack_location import place_of

CFG = WatchConfig(hang_min_s=10, hang_factor=4, start_s=100)


def beat(rank: int, own_s: float | None = 1.0, generation: int = 1) -> Heartbeat:
    now = time.time()
    return Heartbeat(rank, f"n{rank}", 100 + rank, generation, now, 7, STEP, now, 2.0, own_s)


def test_limits_of_steps_and_phases() -> None:
    """A step may take a multiple of the median; any other phase has its own limit."""
    for phase in (START, VALIDATE, SAVE):
        assert limit_s(CFG, phase, 1.0) == 100
    assert limit_s(CFG, STEP, None) == 100, "nothing is known of a step yet"
    assert limit_s(CFG, STEP, 1.0) == 10
    assert limit_s(CFG, STEP, 30.0) == 120
    assert limit_s(CFG, STEP, 1.0, fetch_s=50) == 60, "a remote source may be slow, and is no hang"
    assert limit_s(CFG, START, None, fetch_s=500) == 500
    assert limit_s(CFG, END, 1.0, fetch_s=50) == math.inf


def test_the_watch_is_first_by_default_and_says_where_it_is_not() -> None:
    assert WatchConfig().contradictions(fetch_s=0) == WatchConfig().contradictions(fetch_s=240) == []
    for key in ("hang_min_s", "start_s", "stop_s"):
        [line] = WatchConfig(**{key: 900.0}).contradictions(fetch_s=0)
        assert line.startswith(f"watch.{key}=900 is not below watch.collective_s=900: ")
    [line] = WatchConfig().contradictions(fetch_s=800)
    assert line.startswith("watch.hang_min_s=120 and 800 of data.fetch is not below ")


def test_the_median_is_of_steps_alone() -> None:
    progress = Progress()
    progress.start(5)
    time.sleep(0.2)
    progress.step_done(6)
    assert progress.step_s is None, "the first step of a start compiles"
    progress.step_done(7)
    with progress.phase(SAVE):
        assert progress.state.phase == SAVE
        time.sleep(0.2)
    progress.step_done(8)
    assert progress.state.phase == STEP and progress.state.step == 8
    assert progress.step_s is not None and progress.step_s < 0.1


def test_much_more_work_begins_a_new_median() -> None:
    """So does another length of the windows, which compiles again."""
    progress = Progress()
    progress.start(0)
    for step in range(1, 4):
        progress.next_takes(1000 + step, 64)  # a ramp, slowly
        progress.step_done(step)
    assert progress.step_s is not None and progress.state.phase == STEP
    for work in ((2000, 64), (2000, 128), (2000, 64)):
        progress.next_takes(*work)
        assert (progress.step_s, progress.state.phase, progress.state.step) == (None, START, step)
        for _ in range(2):
            step += 1
            progress.step_done(step)
            progress.next_takes(*work)
        assert progress.step_s is not None and progress.state.phase == STEP


def own_place(ready: threading.Event, go: threading.Event) -> None:
    ready.set()
    go.wait()


def test_the_place_of_a_thread_names_the_innermost_frame() -> None:
    ready, go = threading.Event(), threading.Event()
    thread = threading.Thread(target=own_place, args=(ready, go))
    thread.start()
    ready.wait()
    time.sleep(0.05)
    assert thread.ident is not None
    assert place_of(thread.ident).startswith("wait (")
    go.set()
    thread.join()


def places_in_a_collective() -> list[str]:
    """On rank 0 what `place_of` says while it waits for rank 1, and what its error then says."""
    from conf.errors import TransientError
    from trainer.config.parallel import ParallelConfig
    from trainer.distributed.collective import all_ranks
    from trainer.distributed.lost_ranks import ranks_lost
    from trainer.distributed.mesh import join_ranks
    from trainer.distributed.world import read_world

    world = read_world()
    join_ranks(world, ParallelConfig(name="one"), timeout_s=20)
    main, found = threading.get_ident(), []
    if world.rank == 1:
        time.sleep(2)
        os._exit(0)  # as if killed
    looker = threading.Timer(1.0, lambda: found.append(place_of(main)))
    looker.start()
    try:
        with ranks_lost(world, 20):
            all_ranks("x", lambda: 1)
    except TransientError as e:
        return [*found, str(e)]
    return found


def test_a_waiting_rank_is_in_the_collective(tmp_path: Path) -> None:
    """And the error of a peer that is gone is one line."""
    code = (
        "import json, sys, tests.unit.trainer.health.test_watchdog as t; found = t.places_in_a_collective(); "
        "open(sys.argv[1], 'w').write(json.dumps(found)); import os; os._exit(0)"
    )
    port = free_port()
    ranks = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / str(r))], env=rank_env(r, 2, port), cwd=ROOT)
        for r in range(2)
    ]
    assert [p.wait(100) for p in ranks] == [0, 0]
    waiting, line = json.loads((tmp_path / "0").read_text())
    assert waiting.startswith("collective all_gather_object, called by all_ranks (trainer/distributed/collective.py:")
    assert line.startswith("rank 0 of 2 on ") and "lost the connection to another rank: " in line and waiting in line


def test_the_report_names_who_is_not_where_most_wait() -> None:
    def spots(*places: str) -> list[Spot]:
        return [Spot(r, f"n{r}", 8, STEP, 12.0, where) for r, where in enumerate(places)]

    reduce, gather, asleep = (
        "collective all_reduce, called by f",
        "collective all_gather, called by g",
        "sleep (x.py:3)",
    )
    text = report(spots(reduce, asleep, reduce), {}, 10)
    assert text.splitlines()[0] == (
        "hang: 12 s after step 8 without another (limit 10 s): waiting for rank 1 on n1, which is in sleep (x.py:3)"
    )
    assert f"ranks 0 on n0, 2 on n2: {reduce}" in text
    assert "waiting for rank 2 on n2, which is in " + gather in report(spots(reduce, reduce, gather), {}, 10)
    assert "all ranks are in collective all_reduce" in report(spots(reduce, reduce), {}, 10)
    assert "rank 2 on n2 does not answer" in report(spots(reduce, reduce), {2: "n2"}, 10)
    assert "no rank waits for another" in report(spots(asleep, "load (y.py:4)"), {}, 10)
    norm = "read (torch/x.py:1), called by norm (trainer/y.py:2)"  # with NCCL the ranks wait there
    assert "waiting for rank 1 on n1, which is in " + asleep in report(spots(norm, asleep, norm), {}, 10)
    assert f"all ranks are in {norm}" in report(spots(norm, norm), {}, 10)
    assert "no rank waits for another" in report(spots(norm, norm, asleep, asleep), {}, 10)


def test_stacks_are_read_as_written_and_one_rank_reports(tmp_path: Path) -> None:
    """Places of ranks survive the file, the main thread's stack is there however many follow, one report is made."""
    folder = tmp_path / "hangs" / "gen-0001"
    spots = [Spot(r, "host, with comma", r, SAVE, 3.0, "f (a.py:1), called by g (b.py:2)") for r in range(3)]
    over = threading.Event()
    others = [threading.Thread(target=over.wait, name=f"reader {i}") for i in range(120)]
    for thread in others:
        thread.start()
    try:
        for spot in spots:
            write_stacks(folder, spot)
    finally:
        over.set()
    (folder / "rank-00009.txt").write_text("half a li")
    assert read_spots(folder) == spots
    text = (folder / "rank-00001.txt").read_text()
    assert text.index("test_watchdog.py") < text.index("(reader 0)") and "(reader 119)" in text
    assert [publish_report(folder, r, f"from {r}") for r in range(3)] == [True, False, False]
    assert (folder / "report.txt").read_text() == "from 0\n"


def test_heartbeats_come_back_and_damaged_ones_are_not_there(tmp_path: Path) -> None:
    assert read_heartbeats(tmp_path / "none") == []
    folder = tmp_path / "heartbeats"
    for rank in (2, 0, 1):
        write_heartbeat(folder, beat(rank, own_s=None if rank == 1 else 0.5))
    write_heartbeat(folder, beat(3, generation=0))
    assert [b.rank for b in read_heartbeats(folder)] == [0, 1, 2], "of the newest start, by rank"
    whole = (folder / "rank-00001.json").read_bytes()
    rng = random.Random(seeded())
    bad = [b"", b"[]", b"7", b"[" * 4000, b'{"rank": 1}', whole.replace(b'"step": 7', b'"step": "7"'), b"\xff" * 9]
    bad += [whole.replace(b'"since": ', b'"since": NaN, "x": '), whole[: rng.randrange(1, len(whole) - 1)]]
    for body in bad:
        (folder / "rank-00001.json").write_bytes(body)
        assert [b.rank for b in read_heartbeats(folder)] == [0, 2], body[:50]


def test_a_rank_that_is_slow_for_long_is_said_once_in_a_while(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    stragglers = Stragglers(lambda: now)
    said = 0
    for now in range(0, int(LONG_S + AGAIN_S), 5):
        stragglers.look([beat(0), beat(1, own_s=1.1), beat(2, own_s=3.0)])
        said += capsys.readouterr().err.count("rank 2 on n2 is slow: 3 s of its own")
        assert said == (now >= LONG_S)
    assert stragglers.row == {"speed/straggler": pytest.approx(3 / 1.1), "speed/slowest_rank": 2}
    for now in range(1000, 3000, 50):  # now and then slow, never for long
        stragglers.look([beat(0), beat(1), beat(2, own_s=3.0 if now % 100 else 1.0)])
    assert capsys.readouterr().err == ""


def test_any_ranks_wish_stops_all_and_the_strongest_counts() -> None:
    usr1, term, interrupt = CODES
    for wishes, expected in (
        ([0, 0, 0], None),
        ([1, 0, 0], usr1),
        ([2, 1, 0], term),
        ([0, 0, 3], interrupt),
    ):
        assert agreed([float(n) for n in wishes]) is expected
    signals = Signals()
    assert agreed(signals.wishes()) is None
    signals.got[signal.SIGTERM] = time.monotonic()
    assert agreed(signals.wishes()) is signal.SIGTERM


WAITING = """
import errno, os, sys, threading, time
from pathlib import Path
from trainer.run.progress import Progress
from trainer.run.folder import RunFolder
from trainer.config.health import WatchConfig
from trainer.health.watchdog import Watch
from trainer.distributed.world import World
run, progress = RunFolder(sys.argv[1]), Progress()
limit, ill = float(sys.argv[2]), sys.argv[3]
cfg = WatchConfig(beat_s=0.1, hang_min_s=limit, hang_factor=1, start_s=limit)
generation = run.take_generation()
def stale(self):
    Path(sys.argv[1], "asked").touch()
    raise OSError(errno.ESTALE, "Stale file handle")
def blocks(self):
    Path(sys.argv[1], "asked").touch()
    time.sleep(1000)
if ill:
    RunFolder.newest_generation = {"stale": stale, "blocks": blocks}[ill]
progress.drain = lambda: Path(sys.argv[1], "lingered").touch()
watch = Watch(cfg, run, generation, World(0, 1, 0), progress, lambda: Path(sys.argv[1], "flushed").touch())
print("up", flush=True)
for line in sys.stdin:
    if line == "end\\n":
        progress.end()
        print("ending", flush=True)
watch.close()
"""


def waiting(run: Path, limit_s: float, ill: str = "") -> subprocess.Popen[str]:
    """A rank that comes no further until its stdin ends."""
    words, pipe = [sys.executable, "-c", WAITING, str(run), str(limit_s), ill], subprocess.PIPE
    process = subprocess.Popen(words, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    return process


def test_a_stopped_process_is_not_hung(tmp_path: Path) -> None:
    """Not even after twice the limit: SIGSTOP is no hang."""
    process = waiting(tmp_path, 2.0)
    while not read_heartbeats(tmp_path / "heartbeats"):
        time.sleep(0.02)
    process.send_signal(signal.SIGSTOP)
    time.sleep(9.5)
    process.send_signal(signal.SIGCONT)
    time.sleep(0.2)
    assert (process.communicate()[1], process.returncode) == ("", 0)
    [only] = read_heartbeats(tmp_path / "heartbeats")
    assert (only.pid, only.phase, only.step) == (process.pid, START, 0)


@pytest.mark.parametrize("ill", ["", "stale", "blocks"])
def test_a_hung_process_flushes_and_ends_with_86(tmp_path: Path, ill: str) -> None:
    """Whatever the file system of the run folder does."""
    process = waiting(tmp_path, 2.5, ill)
    assert process.wait(60) == 86
    assert (tmp_path / "flushed").exists() and (tmp_path / "lingered").exists()
    assert (tmp_path / "asked").exists() == bool(ill)
    err = process.communicate()[1]
    said = "watch: rank 0 writes no heartbeat: [Errno 116] Stale file handle; training goes on\n" * (ill == "stale")
    assert err.startswith(f"{said}watch: hang: ")
    assert "without another (limit 2 s): no rank waits for another; rank 0" in err


def test_the_end_of_a_run_is_no_hang_and_answers_one_of_others(tmp_path: Path) -> None:
    process = waiting(tmp_path, 1.5)
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("end\n")
    process.stdin.flush()
    assert process.stdout.readline() == "ending\n"
    folder = tmp_path / "hangs" / "gen-0001"
    folder.mkdir(parents=True)
    time.sleep(3)
    assert [(spot.rank, spot.phase) for spot in read_spots(folder)] == [(0, END)]
    assert (process.communicate()[1], process.returncode) == ("", 0)


ALONE_AT = """
import signal, sys, time
from trainer.run.progress import Progress
from trainer.run.signals import Signals
progress, signals = Progress(), Signals().install()
progress.start(7)
progress.drain = lambda: print("lingered", flush=True)
signals.train(progress, 0.2)
progress.start(int(sys.argv[1]))
signal.raise_signal(signal.SIGUSR1)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("step", "code", "out", "said"),
    [
        (7, 85, "", "error: SIGUSR1 in the first step: nothing to save, nothing lost\n"),
        (8, 87, "lingered\n", "error: SIGUSR1 after step 8, and the other ranks did not agree to stop within 0 s "),
    ],
)
def test_a_signal_without_agreement(step: int, code: int, out: str, said: str) -> None:
    """Nothing is lost in the first step; later the last checkpoint stays."""
    words = [sys.executable, "-c", ALONE_AT, str(step)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (code, out)
    assert done.stderr.startswith(said)


def test_a_living_start_is_named_and_ends_when_taken_over(tmp_path: Path) -> None:
    """Refused while its process lives, whatever its clock says; with its number taken over, and then it ends."""
    run = RunFolder(tmp_path)
    refuse_living(run, None, 0.1)  # a new run
    process = waiting(tmp_path, 1000.0)
    while not read_heartbeats(run.heartbeats):
        time.sleep(0.02)
    said = f"start 1 goes on: rank 0 is process {process.pid} on .*: stop it first, or give take_over=1"
    for take_over in (None, 2):
        with pytest.raises(UserError, match=said):
            refuse_living(run, take_over, 0.1)
    refuse_living(run, 1, 0.1)
    assert run.take_generation() == 2
    _, err = process.communicate(timeout=300)
    assert process.returncode == USER_ERROR and "start 2 of this run has taken over, start 1 publishes nothing" in err
    refuse_living(run, None, 0.1)


@pytest.mark.parametrize("how", ["killed", "stopped", "ended"])
def test_a_start_that_is_gone_stops_no_other(tmp_path: Path, how: str) -> None:
    """Killed a moment ago, asleep on a host that does not answer, or ended well: its last heartbeat is young."""
    process = waiting(tmp_path, 1000.0)
    while not read_heartbeats(tmp_path / "heartbeats"):
        time.sleep(0.02)
    if how == "ended":
        process.communicate("end\n")
        [beat] = read_heartbeats(tmp_path / "heartbeats")
        assert beat.phase == END
        write_heartbeat(tmp_path / "heartbeats", replace(beat, host="n7"))  # another one's process cannot be asked
    else:
        process.send_signal({"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}[how])
    try:
        refuse_living(RunFolder(tmp_path), None, 0.1)
    finally:
        process.kill()
        process.communicate()


def test_a_requeued_job_follows_itself_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    run = RunFolder(tmp_path)
    run.take_generation(job={"SLURM_JOB_ID": "7"})
    beat = Heartbeat(0, "n7", 1, 1, time.time(), 5, START, time.time(), None, None)
    going = threading.Event()

    def beats() -> None:
        while not going.wait(0.02):
            write_heartbeat(run.heartbeats, replace(beat, time=time.time()))

    write_heartbeat(run.heartbeats, beat)
    thread = threading.Thread(target=beats)
    thread.start()
    try:
        for job, refused in (("7", True), ("8", True), ("7", False)):
            monkeypatch.setenv("SLURM_JOB_ID", job)
            monkeypatch.setenv("SLURM_RESTART_COUNT", "0" if refused else "1")
            with pytest.raises(UserError, match="start 1 goes on") if refused else nullcontext():
                refuse_living(run, None, 0.1)
    finally:
        going.set()
        thread.join()
