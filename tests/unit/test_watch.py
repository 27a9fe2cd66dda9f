"""The watch's rules, without a run: limits, places, reports, heartbeats, stragglers, signals."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.ranks import ROOT, free_port, rank_env
from trainer.hang import Spot, place_of, publish_report, read_spots, report, write_stacks
from trainer.heartbeat import Heartbeat, read_heartbeats, write_heartbeat
from trainer.progress import SAVE, START, STEP, VALIDATE, At, Progress
from trainer.safety_config import WatchConfig
from trainer.signals import CODES, Signals, agreed
from trainer.watch import AGAIN_S, LONG_S, Stragglers, limit_s

CFG = WatchConfig(hang_min_s=10, hang_factor=4, start_s=100)


def beat(rank: int, own_s: float | None = 1.0, generation: int = 1) -> Heartbeat:
    now = time.time()
    return Heartbeat(rank, f"n{rank}", 100 + rank, generation, now, 7, STEP, now, 2.0, own_s)


def test_a_step_may_take_a_multiple_of_the_median_and_what_is_no_step_its_own_time() -> None:
    for phase in (START, VALIDATE, SAVE):
        assert limit_s(CFG, At(phase, 5, 0.0), 1.0) == 100
    assert limit_s(CFG, At(STEP, 5, 0.0), None) == 100, "nothing is known of a step yet"
    assert limit_s(CFG, At(STEP, 5, 0.0), 1.0) == 10
    assert limit_s(CFG, At(STEP, 5, 0.0), 30.0) == 120


def test_the_median_is_of_steps_alone() -> None:
    progress = Progress()
    progress.begin(5)
    time.sleep(0.2)
    progress.step_done(6)
    assert progress.step_s is None, "the first step of a start compiles"
    progress.step_done(7)
    with progress.phase(SAVE):
        assert progress.at.phase == SAVE
        time.sleep(0.2)
    progress.step_done(8)
    assert progress.at.phase == STEP and progress.at.step == 8
    assert progress.step_s is not None and progress.step_s < 0.1


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
    from data_pipeline.config import Passing
    from trainer.checkpoint import together
    from trainer.config import ParallelConfig
    from trainer.parallel import ranks_lost, start
    from trainer.world import read_world

    world = read_world()
    start(world, ParallelConfig(name="one"), timeout_s=20)
    main, found = threading.get_ident(), []
    if world.rank == 1:
        time.sleep(2)
        os._exit(0)  # as if killed
    looker = threading.Timer(1.0, lambda: found.append(place_of(main)))
    looker.start()
    try:
        with ranks_lost(world, 20):
            together("x", lambda: 1)
    except Passing as e:
        return [*found, str(e)]
    return found


def test_a_rank_that_waits_is_in_the_collective_and_a_peer_that_is_gone_is_one_line(tmp_path: Path) -> None:
    code = (
        "import json, sys, tests.unit.test_watch as t; found = t.places_in_a_collective(); "
        "open(sys.argv[1], 'w').write(json.dumps(found)); import os; os._exit(0)"
    )
    port = free_port()
    ranks = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / str(r))], env=rank_env(r, 2, port), cwd=ROOT)
        for r in range(2)
    ]
    assert [p.wait(100) for p in ranks] == [0, 0]
    waiting, line = json.loads((tmp_path / "0").read_text())
    assert waiting.startswith("collective all_gather_object, called by together (trainer/checkpoint.py:")
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


def test_stacks_come_back_as_they_were_found_and_one_rank_reports(tmp_path: Path) -> None:
    folder = tmp_path / "hangs" / "gen-0001"
    spots = [Spot(r, "host, with comma", r, SAVE, 3.0, "f (a.py:1), called by g (b.py:2)") for r in range(3)]
    for spot in spots:
        write_stacks(folder, spot)
    (folder / "rank-00009.txt").write_text("half a li")
    assert read_spots(folder) == spots
    assert "test_watch.py" in (folder / "rank-00001.txt").read_text()
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
    rng = random.Random()
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
import sys, threading, time
from pathlib import Path
from trainer.progress import Progress
from trainer.run_folder import RunFolder
from trainer.safety_config import WatchConfig
from trainer.watch import Watch
from trainer.world import World
run = RunFolder(sys.argv[1])
cfg = WatchConfig(beat_s=0.1, hang_min_s=2.5, hang_factor=1, start_s=2.5)
watch = Watch(cfg, run, run.take_generation(), World(0, 1, 0), Progress(), lambda: Path(sys.argv[1], "flushed").touch())
print("up", flush=True)
time.sleep(float(sys.argv[2]))
watch.close()
"""


def waiting(run: Path, seconds: float) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", WAITING, str(run), str(seconds)]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    return process


def test_a_process_that_was_stopped_for_longer_than_the_limit_is_not_hung(tmp_path: Path) -> None:
    process = waiting(tmp_path, 5.0)
    while not read_heartbeats(tmp_path / "heartbeats"):
        time.sleep(0.02)
    process.send_signal(signal.SIGSTOP)
    time.sleep(4.0)
    process.send_signal(signal.SIGCONT)
    assert (process.wait(30), process.communicate()[1]) == (0, "")
    [only] = read_heartbeats(tmp_path / "heartbeats")
    assert (only.pid, only.phase, only.step) == (process.pid, START, 0)


def test_a_process_that_comes_no_further_flushes_and_ends_with_86(tmp_path: Path) -> None:
    process = waiting(tmp_path, 100.0)
    assert process.wait(60) == 86
    assert (tmp_path / "flushed").exists()
    err = process.communicate()[1]
    assert err.startswith("watch: hang: ") and "without another (limit 2 s): no rank waits for another; rank 0" in err
