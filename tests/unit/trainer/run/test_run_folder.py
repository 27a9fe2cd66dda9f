"""The run folder: who may write, what is published, what is pruned. No torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from conf.errors import UserError
from trainer.checkpoint.find import check_model, model_of, to_resume
from trainer.config.model import ModelConfig
from trainer.run.folder import RunFolder
from trainer.run.owner import command


def publish(run: RunFolder, step: int, generation: int) -> Path:
    aside = run.staging(step, generation)
    aside.mkdir()
    (aside / "state.json").write_text(json.dumps({"step": step}))
    return run.publish(aside, step, generation)


def names(run: RunFolder) -> list[str]:
    return [p.name for p in run.published()]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "runs" / "a")
    assert folder.take_generation() == 1
    return folder


def test_it_needs_no_torch() -> None:
    code = "import sys, trainer.run.folder, trainer.engine.schedule; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[4]).returncode == 0


def test_a_missing_folder_has_no_checkpoint_and_is_not_made(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "none")
    assert folder.latest() is None and folder.published() == []
    assert not folder.root.exists()


def test_starts_at_the_same_moment_get_their_own_generations(run: RunFolder) -> None:
    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(lambda _: RunFolder(run.root).take_generation(), range(24)))
    assert sorted(taken) == list(range(2, 26))


def test_the_last_published_is_the_latest(run: RunFolder) -> None:
    assert publish(run, 10, 1) == run.latest()
    assert publish(run, 20, 1) == run.latest() == run.checkpoints / "step-00000020.gen-0001"
    assert names(run) == ["step-00000010.gen-0001", "step-00000020.gen-0001"]


def test_what_is_published_is_on_the_disk_before_it_counts(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of checkpoints, then the new pointer, then the folder with it: so a power cut loses no checkpoint."""
    real, synced = os.fsync, list[tuple[str, bool]]()

    def fsync(fd: int) -> None:
        synced.append((Path(f"/proc/self/fd/{fd}").readlink().name, run.pointer.exists()))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    publish(run, 10, 1)
    assert synced == [("checkpoints", False), (f".latest.{os.getpid()}.tmp", False), ("checkpoints", True)]


def test_a_newer_start_goes_before_a_later_step(run: RunFolder) -> None:
    publish(run, 20, 1)
    run.take_generation()
    publish(run, 10, 2)
    assert names(run) == ["step-00000020.gen-0001", "step-00000010.gen-0002"]
    assert run.latest() == run.checkpoints / "step-00000010.gen-0002"


def test_a_stranded_start_publishes_nothing_over_a_newer_one(run: RunFolder) -> None:
    stranded = RunFolder(run.root)
    publish(run, 10, 1)
    run.take_generation()
    kept = publish(run, 15, 2)
    with pytest.raises(UserError, match="start 2 of this run has taken over, start 1 publishes nothing"):
        publish(stranded, 20, 1)
    assert run.latest() == kept and len(names(run)) == 2


def test_a_checkpoint_is_settled_when_gone_or_pointed_to(run: RunFolder) -> None:
    run.staging(20, 1).mkdir()
    assert not run.settled(20, 1)
    run.staging(20, 1).rename(run.checkpoint(20, 1))
    assert not run.settled(20, 1)
    run.pointer.write_text(f"{run.checkpoint(10, 1).name}\n")
    assert not run.settled(20, 1)
    run.pointer.write_text(f"{run.checkpoint(20, 1).name}\n")
    assert run.settled(20, 1) and run.settled(30, 1)


def test_an_unpublished_checkpoint_is_ignored_then_removed(run: RunFolder) -> None:
    """A checkpoint that was never published is ignored, and the next start removes it."""
    kept = publish(run, 10, 1)
    run.staging(20, 1).mkdir()
    (run.staging(20, 1) / "weights").write_text("half")
    (run.checkpoints / ".latest.7.tmp").write_text("half")
    assert run.latest() == kept and names(run) == [kept.name]
    run.take_generation()
    assert sorted(p.name for p in run.checkpoints.iterdir()) == ["latest", kept.name]


def test_a_crash_before_the_pointer_leaves_the_one_before(run: RunFolder) -> None:
    """The crash comes between the rename of a checkpoint and the pointer's move."""
    kept = publish(run, 10, 1)
    run.staging(20, 1).mkdir()
    run.staging(20, 1).rename(run.checkpoint(20, 1))
    assert run.latest() == kept
    run.take_generation()
    assert publish(run, 20, 2) == run.latest()


@pytest.mark.parametrize("text", [None, "step-00000099.gen-0001", "../../etc", "", "step-1.gen-1"])
def test_without_a_good_pointer_the_newest_is_the_latest(run: RunFolder, text: str | None) -> None:
    """A clean-up that removed the pointer, or a copy that left it out, makes no new run."""
    publish(run, 10, 1)
    newest = publish(run, 20, 1)
    assert run.pointer_problem() is None
    run.pointer.unlink()
    if text is not None:
        run.pointer.write_text(text)
    assert run.latest() == newest
    assert (run.pointer_problem() or "").endswith("missing" if text is None else f"names {text!r}, which is not there")
    run.take_generation()
    run.begin(2, newest)
    assert run.latest() == newest and run.pointer_problem() is None


def test_a_start_deletes_nothing_that_it_does_not_descend_from(run: RunFolder) -> None:
    """Start 2 goes on from step 10 of start 1; start 3 from step 20 of start 2, and start 4 begins anew."""
    for step in (10, 20, 30):
        publish(run, step, 1)
    for start, source, steps in ((2, (10, 1), (20, 40)), (3, (20, 2), (30, 50)), (4, None, (10, 20))):
        assert run.take_generation() == start
        run.begin(start, run.checkpoint(*source) if source else None)
        for step in steps:
            publish(run, step, start)
    line = [run.checkpoint(*at) for at in ((10, 1), (20, 2), (30, 3), (50, 3))]
    assert run.lineage(3) == line
    assert run.before(29, 10, generation=3) == line[1]
    assert run.prune(keep=1, generation=4) == [run.checkpoint(10, 4)]
    before = names(run)
    run.take_generation()
    others = run.begin(5, line[-1])
    assert others == [run.checkpoint(*at) for at in ((20, 1), (30, 1), (40, 2), (20, 4))]
    assert run.prune(keep=1, generation=5) == line[:-1]
    assert names(run) == [name for name in before if name not in [p.name for p in line[:-1]]]


def test_the_next_candidates_are_ancestors_then_the_others(run: RunFolder) -> None:
    for step in (10, 20, 30):
        publish(run, step, 1)
    run.take_generation()
    run.begin(2, run.checkpoint(20, 1))
    newest = publish(run, 30, 2)
    order = [run.checkpoint(*at) for at in ((30, 2), (20, 1), (10, 1), (30, 1))]
    assert run.candidates() == order
    aside = run.set_aside(newest, 2)
    assert aside.is_dir() and newest not in run.published()
    assert run.candidates()[0] == run.checkpoint(30, 1), "the newest that is left, for the pointer names none"
    run.begin(2, run.checkpoint(20, 1))
    assert run.candidates() == order[1:3], "newer ones than the pointer names are never taken"


def test_a_rollback_to_the_beginning_is_no_lost_pointer(run: RunFolder) -> None:
    """A kill after the pointer has moved and before the checkpoints of the bad steps are deleted."""
    publish(run, 10, 1)
    run.go_back(None, generation=1)
    run.checkpoint(10, 1).mkdir()  # as if it were not deleted
    assert run.candidates() == [] and run.pointer_problem() is None


def test_checkpoints_without_starts_tell_the_next_number(run: RunFolder) -> None:
    """A copy of `checkpoints` alone: the next start must not publish under a name that exists."""
    publish(run, 10, 1)
    (run.generations / "0001").unlink()
    assert run.take_generation() == 2
    assert run.begin(2, run.latest()) == []


def test_files_of_others_among_the_checkpoints_are_kept(run: RunFolder) -> None:
    publish(run, 10, 1)
    mine = [
        run.checkpoints / name for name in (".notes.tmp", "step-10", "step-00000010.gen-0001.backup", ".step-x.tmp")
    ]
    for path in mine:
        path.mkdir()
        (path / "thesis").write_text("years")
    run.take_generation()
    run.prune(keep=1, generation=2)
    run.go_back(None, generation=2)
    assert all((path / "thesis").exists() for path in mine) and names(run) == []


def test_resume_step_names_the_newest_of_that_step_once(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that is repeated goes on, also after a rollback and a start that was killed before it began."""

    def begin(*words: str) -> Path:
        monkeypatch.setattr(sys, "argv", ["pretrain", *words])
        generation = run.take_generation(command=command())
        checkpoint = to_resume(run, 10 if "resume_step=10" in words else None)[0]
        run.begin(generation, checkpoint)
        return checkpoint

    publish(run, 10, 1)
    assert begin("resume_step=10") == publish(run, 10, 2).with_name("step-00000010.gen-0001")
    publish(run, 20, 2)
    run.begin(run.take_generation(), run.checkpoint(20, 2))  # a rollback
    run.take_generation(command="of a start that was killed")
    assert begin("resume_step=10") == run.checkpoint(20, 2)
    assert begin("resume_step=10", "optim.lr=1") == run.checkpoint(10, 2), "another command goes back again"
    assert begin() == run.checkpoint(10, 2) == run.latest()
    assert len(names(run)) == 3, "nothing is deleted"


def test_prune_keeps_the_newest_and_what_is_named(run: RunFolder) -> None:
    for step in (10, 20, 30, 40, 50):
        publish(run, step, 1)
    gone = run.prune(2, 1, None, run.checkpoint(20, 1))
    assert [p.name for p in gone] == ["step-00000010.gen-0001", "step-00000030.gen-0001"]
    assert [n[5:13] for n in names(run)] == ["00000020", "00000040", "00000050"]
    assert run.prune(2, 1, run.checkpoint(20, 1)) == []
    run.prune(keep=1, generation=1)
    assert [n[5:13] for n in names(run)] == ["00000050"]
    assert run.latest() == run.published()[0]


def test_going_back_moves_the_pointer_and_deletes_later_ones(run: RunFolder) -> None:
    for step, generation in ((10, 1), (20, 1), (25, 1), (30, 1), (20, 2), (40, 2)):
        publish(run, step, generation)  # of an older version: where a start went on from is not known
    assert run.before(29, 10, generation=2) == run.checkpoint(20, 2), "one that is due, and the newest start's"
    assert run.before(29, 0, generation=2) == run.before(29, 7, generation=2) == run.checkpoint(25, 1), (
        "none is due: any"
    )
    assert run.before(9, 10, generation=2) is None
    gone = run.go_back(run.checkpoint(20, 2), generation=2)
    assert {p.name[5:] for p in gone} == {"00000025.gen-0001", "00000030.gen-0001", "00000040.gen-0002"}
    assert [n[5:] for n in names(run)] == ["00000010.gen-0001", "00000020.gen-0001", "00000020.gen-0002"]
    assert run.latest() == run.checkpoint(20, 2)
    run.go_back(None, generation=2)
    assert run.latest() is None and names(run) == []


def test_a_stranded_start_cannot_go_back(run: RunFolder) -> None:
    kept, latest = publish(run, 10, 1), publish(run, 20, 1)
    run.take_generation()
    with pytest.raises(UserError, match="start 2 of this run has taken over"):
        run.go_back(kept, generation=1)
    assert run.latest() == latest and len(names(run)) == 2


def test_prune_keeps_what_the_guard_may_go_back_to(run: RunFolder) -> None:
    for step in (10, 20, 30):
        publish(run, step, 1)
    run.prune(1, 1, run.before(12, every=10, generation=1))
    assert [n[5:13] for n in names(run)] == ["00000010", "00000030"]


def test_prune_never_deletes_the_latest(run: RunFolder) -> None:
    for step in (10, 20, 30):
        publish(run, step, 1)
    run.pointer.write_text("step-00000010.gen-0001\n")
    run.prune(keep=1, generation=1)
    assert [n[5:13] for n in names(run)] == ["00000010", "00000030"]


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not JSON"), ("[]", "not a JSON object"), ("[" * 100_000, "not JSON"), ("\udcff", "not JSON")],
)
def test_a_damaged_state_is_named(run: RunFolder, text: str, message: str) -> None:
    path = publish(run, 10, 1) / "state.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=f"state.json: {message}"):
        run.state(path.parent)


def test_a_state_of_gigabytes_is_not_read(run: RunFolder) -> None:
    path = publish(run, 10, 1) / "state.json"
    with path.open("r+b") as f:
        f.truncate(10 << 30)  # sparse: takes no disk
    with pytest.raises(UserError, match="more than the"):
        run.state(path.parent)


def test_a_state_without_a_pattern_is_of_a_dense_model(tmp_path: Path) -> None:
    """Checkpoints from before there were patterns are of dense models."""
    old = {"name": "m", "n_layer": 2, "n_head": 2, "n_embd": 4, "n_ctx": 4, "vocab_size": 5, "norm": "pre"}
    (tmp_path / "weights-00000.safetensors").write_bytes(bytes(10_000))
    cfg = model_of(tmp_path, {"model": old})
    assert cfg.attention == "D" and cfg.sparse_layers == []
    for wrong in ({"attention": a} for a in (5, None, ["D"], "Q", "DDD")):
        with pytest.raises(UserError, match="damaged: no model"):
            model_of(tmp_path, {"model": {**old, **wrong}})
    with pytest.raises(UserError, match="damaged: no model"):
        model_of(tmp_path, {"model": {**old, "attention": "B", "band": 1.5}})


def test_a_pattern_written_in_another_way_is_the_same_model(tmp_path: Path) -> None:
    a, b = (ModelConfig("m", 4, 2, 4, 4, 5, attention=text, band=2) for text in ("DB", "DBDB"))
    check_model(tmp_path, a, b)
    c = ModelConfig("m", 4, 2, 4, 4, 5, attention="BD", band=2)
    with pytest.raises(UserError, match=r"another model: model\.attention=DB \(here BD\): give"):
        check_model(tmp_path, a, c)
