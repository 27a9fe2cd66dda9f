"""A checkpoint written while training goes on is the one that a blocking save writes; errors reach all ranks."""

from __future__ import annotations

import contextlib
import json
import threading
from contextlib import nullcontext
from itertools import product
from math import prod
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from conf.errors import TransientError, UserError
from tests.distributed import tiny_run as run
from tests.helpers.ranks import run_ranks
from tests.helpers.seeds import seeded
from tests.system.runs import TINY, make_data
from trainer.checkpoint import save as saving
from trainer.checkpoint.files import SavedWeights
from trainer.config.pretrain import PretrainConfig
from trainer.loop import Trainer
from trainer.model.specs import specs, to_local
from trainer.run.folder import RunFolder
from trainer.run.progress import END, Progress
from trainer.run.signals import Signals
from trainer.tracking.shipper import Status

HERE = "tests.distributed.trainer.checkpoint.test_saving"
STATE = {"tokens": 1, "val_loss": 1.0}
LAYOUTS: dict[str, dict[str, Any]] = {
    "zero3": {"zero": 3},
    "bf16": {"precision": "bf16"},
    "tp2": {"tp": 2, "sequence_parallel": True},
}


def both_ways(folder: str) -> dict[str, Any]:
    """Each layout's checkpoint written blocking, and in the background under two steps of training."""
    for name, how in LAYOUTS.items():
        with run.layout(tp=how.get("tp", 1)) as mesh:
            engine = run.build(run.config(**how), mesh)
            run.curve(engine, range(2))
            for background in (False, True):
                engine.cfg.checkpoint.background = background  # the writer reads it
                saver = run.saver(engine, Path(folder) / name / str(background))
                go = hold(saver) if background else None
                saver.save(2, STATE, last=not background)
                if go:  # nothing is read before the weights have changed
                    run.curve(engine, range(2, 4))
                    go.set()
                saver.wait()
    with run.layout() as mesh:
        engine = run.build(run.config(), mesh)
        return {
            "failing": failing(engine, Path(folder) / "failing"),
            "stranded": stranded(engine, Path(folder) / "stranded"),
            **{how: closed(engine, Path(folder) / how, how) for how in ("close", "drain")},
            "slow": slow(engine, Path(folder) / "slow"),
            "no memory": no_memory(engine, Path(folder) / "memory"),
            "memory": run.saver(engine, Path(folder) / "memory")._snapshot.nbytes,
        }


def hold(saver: Any) -> threading.Event:
    """Until this is set, the saver's thread only stands there."""
    go, write = threading.Event(), saver.writer.write

    def held(save: Any) -> None:
        go.wait(60)
        write(save)

    saver.writer.write = held
    return go


def failing(engine: Any, folder: Path) -> dict[str, Any]:
    """Rank 1's second file cannot be made, and its note neither: rank 0 would wait for ever."""
    saver = run.saver(engine, folder)

    def closed_pipe(*_: Any) -> None:
        raise BrokenPipeError("nobody reads what is published")

    saver.writer.published = closed_pipe
    saver.save(1, STATE)
    saver.wait()
    saver.check()  # nothing is in flight
    go = hold(saver)
    saver.save(2, STATE)
    rank = engine.mesh.world.rank
    if rank == 1:
        for name in ("moments-00001.safetensors", ".rank-00001.json"):
            (folder / "checkpoints" / ".step-00000002.gen-0001.tmp" / name).mkdir()
    go.set()
    if rank == 1:
        saver._thread.join()
    flagged = saver.failed
    error = error_of(saver.check)
    dist.barrier()
    left = sorted(p.name for p in (folder / "checkpoints").iterdir())
    again = error_of(saver.wait)  # it was told once
    dist.barrier()  # both have looked
    theirs = folder / "checkpoints" / ".step-00000003.gen-0001.tmp"
    if rank == 0:
        theirs.mkdir()
        (theirs / "thesis").write_text("years")
    refused = error_of(lambda: saver.save(3, STATE))
    dist.barrier()
    kept = [path.name for path in theirs.iterdir()]
    return {"flagged": flagged, "error": error, "left": left, "again": again, "refused": refused, "kept": kept}


def stranded(engine: Any, folder: Path) -> dict[str, Any]:
    """A newer start takes the run while a save is in flight, and clears what that one writes."""
    saver = run.saver(engine, folder)
    go = hold(saver)
    saver.save(1, STATE)
    if engine.mesh.world.is_main:
        RunFolder(folder).take_generation()
    run.one_step(engine, 0)  # rank 1 comes here after rank 0
    go.set()
    return {"error": error_of(saver.wait), "left": [p.name for p in (folder / "checkpoints").iterdir()]}


def closed(engine: Any, folder: Path, how: str) -> list[str]:
    """The run ends, by an error or at once, while rank 0 has still to write: published before any rank goes."""
    saver = run.saver(engine, folder)
    late(saver, rank=0)
    saver.save(1, STATE)
    getattr(saver, how)()
    left = sorted(p.name for p in (folder / "checkpoints").iterdir())
    dist.barrier()
    return left


def late(saver: Any, rank: int) -> None:
    """This rank's thread starts to write half a second after the others'."""
    if saver.writer.mesh.world.rank == rank:
        threading.Timer(0.5, hold(saver).set).start()


def slow(engine: Any, folder: Path) -> list[bool]:
    """Rank 1's disk is slow: was the checkpoint published whenever this rank went into a collective over it? And did
    the wait say that it is no hang?"""
    saver, published, moved = run.saver(engine, folder), [], threading.Event()
    saver._on_progress = moved.set
    ask = saver._failures

    def asked() -> Any:
        published.append(RunFolder(folder).latest() is not None)
        return ask()

    saver._failures = asked
    late(saver, rank=1)
    saver.save(1, STATE)
    saver.wait()
    return [*published, moved.is_set()]


def no_memory(engine: Any, folder: Path) -> str:
    """Rank 1 finds no room for its copy: rank 0 must not be left behind."""
    check = saving.check_room
    if engine.mesh.world.rank == 1:
        little = folder.with_name("meminfo")
        little.write_text("MemTotal: 9 kB\nMemAvailable:       1 kB\n")
        saving.check_room = lambda sizes: check(sizes, little)
    with contextlib.ExitStack() as stack:
        stack.callback(setattr, saving, "check_room", check)
        return error_of(lambda: run.saver(engine, folder))


def error_of(function: Any) -> str:
    try:
        function()
    except UserError as e:
        return f"{'may pass: ' if isinstance(e, TransientError) else ''}{e}"
    return "none"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saving")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return run_ranks(2, f"{HERE}:both_ways", folder=str(folder))


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_background_save_holds_the_bytes_of_a_blocking_one(name: str, ranks: list[Any], folder: Path) -> None:
    blocking, background = (
        {p.name: p.read_bytes() for p in (folder / name / str(way) / "checkpoints").glob("step-*/*")}
        for way in (False, True)
    )
    hf = {"model.safetensors", "config.json"}  # asked for once only
    assert blocking.keys() - hf == background.keys() and len(background) == 8 and hf < blocking.keys()
    manifests = [json.loads(files.pop("manifest.json"))["files"] for files in (blocking, background)]
    assert {k: v for k, v in manifests[0].items() if k not in hf} == manifests[1]
    for file, body in background.items():
        assert body == blocking[file], file


def test_a_rank_that_cannot_report_its_error_stops_all(ranks: list[Any]) -> None:
    """At the next step: its training thread reports the error, not its files."""
    assert [got["failing"]["flagged"] for got in ranks] == [False, True]
    for got in (answer["failing"] for answer in ranks):
        assert got["error"].startswith("the checkpoint of step 2 is not written"), "a folder in the way stays there"
        assert got["error"].endswith("(rank 1)"), got
        assert "moments-00001.safetensors" in got["error"] and "\n" not in got["error"]
        assert got["left"] == ["latest", "step-00000001.gen-0001"] and got["again"] == "none"


def test_a_folder_of_others_in_a_saves_place_stays(ranks: list[Any]) -> None:
    for got in (answer["failing"] for answer in ranks):
        assert got["refused"].startswith("the checkpoint of step 3 is not written") and "File exists" in got["refused"]
        assert got["kept"] == ["thesis"]


def test_a_save_in_flight_publishes_nothing_over_a_newer_start(ranks: list[Any]) -> None:
    for got in (answer["stranded"] for answer in ranks):
        assert got["error"].startswith("the checkpoint of step 1 is not written")  # and it will not pass
        assert "start 2 of this run has taken over" in got["error"] and "No such file" not in got["error"]
        assert got["left"] == []


def test_a_save_in_flight_is_published_after_an_error(ranks: list[Any]) -> None:
    """Before any rank leaves, for a launcher then ends the others."""
    for how in ("close", "drain"):
        assert [got[how] for got in ranks] == [["latest", "step-00000001.gen-0001"]] * 2


def test_no_rank_waits_in_a_collective_for_a_slow_disk(ranks: list[Any]) -> None:
    """And the wait reports its progress to the watchdog."""
    assert [got["slow"] for got in ranks] == [[True, True, True]] * 2


def test_no_memory_for_a_copy_ends_all_before_step_1(ranks: list[Any]) -> None:
    """No rank is left behind by one that finds no room."""
    parameters = sum(prod(spec.padded) for spec in specs(run.model_config(), tp=1).values())
    for got in (answer["no memory"] for answer in ranks):
        assert f"{12 * parameters:,} bytes of host memory" in got and "2 ranks of this node, 1,024 bytes" in got, got
        assert "checkpoint.background=false" in got and got.endswith("(rank 1)"), got


@pytest.mark.parametrize("begun", [True, False])
def test_everything_is_closed_even_if_the_last_save_raises(begun: bool) -> None:
    """Also if the start failed before there was a feed or a saver."""
    closed: list[Any] = []

    def defect() -> None:
        raise ZeroDivisionError

    def close(*how: Any) -> None:
        closed.append(how)

    parts: dict[str, Any] = {name: SimpleNamespace(close=close) for name in ("tracker", "watch", "trace")}
    parts |= {"signals": Signals(), "progress": (progress := Progress()), "_open_parts": contextlib.ExitStack()}
    for opened in (close, defect) if begun else ():
        parts["_open_parts"].callback(opened)
    with pytest.raises(ZeroDivisionError) if begun else nullcontext():
        Trainer.__exit__(SimpleNamespace(**parts), UserError, UserError(), None)  # type: ignore[arg-type]
    assert closed == [*[()] * begun, (Status.failed,), (), ()]
    assert progress.state.phase == END, "what closes is no hang"


def start_without_saver(run_dir: str, data: str) -> dict[str, Any]:
    """The second half of a start fails: the error, and the threads that live on."""
    from conf.schema import load
    from trainer import setup
    from trainer.check import Checked
    from trainer.data.sources import open_sources
    from trainer.distributed.world import read_world
    from trainer.pretrain import language_model

    def refuse(*_: Any) -> None:
        raise UserError("no memory")

    setup.Saver = refuse  # type: ignore[assignment, misc]
    cfg, world = load(PretrainConfig, [*TINY, f"run.dir={run_dir}", f"data.path={data}", "max_steps=3"]), read_world()
    error = error_of(lambda: Trainer(cfg, "", world, language_model(Checked(cfg, open_sources(cfg.data), {}, ""))))
    return {"error": error, "alive": [thread.name for thread in threading.enumerate()]}


def test_a_start_that_fails_halfway_closes_what_it_has_begun(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    [got] = run_ranks(1, f"{HERE}:start_without_saver", run_dir=str(tmp_path / "run"), data=str(data))
    assert got["error"] == "no memory"
    assert not {"watch", "heartbeat", "journal", "system", "loader"} & set(got["alive"]), got["alive"]
    assert (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_snapshot_takes_twelve_bytes_a_parameter(ranks: list[Any]) -> None:
    """Over all ranks together."""
    parameters = sum(prod(spec.padded) for spec in specs(run.model_config(), tp=1).values())
    assert sum(got["memory"] for got in ranks) == 12 * parameters


def test_a_slice_for_another_layout_reads_no_more_than_it(ranks: list[Any], folder: Path) -> None:
    """It has the same elements as the whole parameter."""
    read: list[int] = []

    class Counting(SavedWeights):
        def _read(self, kind: str, name: str, tp_rank: int, start: int, length: int) -> torch.Tensor:
            read.append(length)
            return super()._read(kind, name, tp_rank, start, length)

    rng = Random(seed := seeded())
    for saved in ("bf16", "tp2"):
        latest = RunFolder(folder / saved / "False").latest()
        assert latest is not None
        source = Counting(latest)
        for tp, (name, spec) in product((1, 2, 3, 4), source.specs.items()):
            layout, rank = specs(source.cfg, tp)[name], rng.randrange(tp)
            want = to_local(source.full("exp_avg", name), layout, rank, tp).reshape(-1)
            start = rng.randrange(want.numel())
            length = rng.randint(1, want.numel() - start)
            read.clear()
            got = source.part("exp_avg", name, layout, rank, tp, start, length)
            assert torch.equal(got, want[start : start + length]), (seed, saved, tp, name, rank, start, length)
            row = want.numel() // (layout.padded[0] // (tp if spec.tp_dim == 0 else 1))
            rows = length // row + 2  # where columns are split, whole rows of them are read
            most = rows * source.specs[name].padded[1] if spec.tp_dim == 1 else length + 2 * row
            assert sum(read) <= most, (seed, saved, tp, name, sum(read), most)
