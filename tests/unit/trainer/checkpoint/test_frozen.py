"""The copy of a run's reference: whole or not there, verified, and no file of others removed for it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from conf.errors import UserError
from data_pipeline.manifest import TOKENIZER
from trainer.checkpoint.frozen import keep_reference
from trainer.checkpoint.verify import MANIFEST, check_files, verify
from trainer.run.folder import RunFolder

KEPT = {"weights-00000.safetensors", "index.json", "state.json", TOKENIZER, MANIFEST}


def checkpoint(path: Path) -> Path:
    """The files of one, with any content."""
    path.mkdir()
    files = {}
    for name in (*KEPT - {MANIFEST}, "moments-00000.safetensors", "config.yaml", "model.safetensors"):
        (path / name).write_bytes(name.encode() * 1000)
        files[name] = {"bytes": 1000 * len(name), "sha256": hashlib.sha256(name.encode() * 1000).hexdigest()}
    del files[TOKENIZER]  # put there by hand
    (path / MANIFEST).write_text(json.dumps({"format": 1, "files": files}))
    return path


def started(root: Path) -> RunFolder:
    run = RunFolder(root)
    run.take_generation()
    return run


def test_the_weights_are_copied_with_their_sums(tmp_path: Path, mesh: Any) -> None:
    """Once: a later start needs the checkpoint no more."""
    base, run = checkpoint(tmp_path / "base"), started(tmp_path / "run")
    folder = keep_reference(run, mesh, str(base), resumed=False)
    assert {path.name for path in folder.iterdir()} == KEPT
    files = check_files(folder)
    verify(folder, files, files)
    assert files.keys() == KEPT - {MANIFEST}
    assert keep_reference(run, mesh, str(tmp_path / "gone"), resumed=True) == folder


def test_a_copy_that_fails_leaves_no_reference(tmp_path: Path, mesh: Any) -> None:
    base, run = checkpoint(tmp_path / "base"), started(tmp_path / "run")
    whole = (base / "index.json").read_bytes()
    (base / "index.json").write_bytes(whole[::-1])
    with pytest.raises(UserError, match=r"index\.json: its sha256 is not the manifest's"):
        keep_reference(run, mesh, str(base), resumed=False)
    assert not (run.root / "reference").exists()
    (base / "index.json").write_bytes(whole)
    again = started(run.root)
    assert keep_reference(again, mesh, str(base), resumed=False).is_dir()
    assert not list(run.root.glob(".reference*"))


def test_a_run_that_lost_its_reference_is_refused(tmp_path: Path, mesh: Any) -> None:
    base, run = checkpoint(tmp_path / "base"), started(tmp_path / "run")
    with pytest.raises(UserError, match="has checkpoints and no reference/"):
        keep_reference(run, mesh, str(base), resumed=True)


def test_files_of_others_beside_the_reference_stay(tmp_path: Path, mesh: Any) -> None:
    """Only the folders that a killed start of this run left are removed; a stranger's `reference` is not replaced."""
    base, run = checkpoint(tmp_path / "base"), started(tmp_path / "run")
    theirs = (".reference.tmp", ".reference.gen-1.tmp", ".reference.gen-0001.tmp.old", ".reference.gen-mine.tmp")
    for name in (*theirs, ".reference.gen-0000.tmp"):
        (run.root / name).mkdir()
        (run.root / name / "notes").write_text("years")
    (run.root / ".reference.gen-0009.tmp").write_text("a file")
    keep_reference(run, mesh, str(base), resumed=False)
    assert all((run.root / name / "notes").read_text() == "years" for name in theirs)
    assert (run.root / ".reference.gen-0009.tmp").read_text() == "a file"
    assert not (run.root / ".reference.gen-0000.tmp").exists()
    other = started(tmp_path / "other")
    (other.root / "reference").mkdir()
    (other.root / "reference" / "notes").write_text("years")
    keep_reference(other, mesh, str(base), resumed=False)
    assert [path.name for path in (other.root / "reference").iterdir()] == ["notes"]
