"""What a checkpoint takes of the machine, and says when it is not there: memory, and a disk that is written in time."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from conf.errors import UserError
from trainer.checkpoint import files as weights
from trainer.checkpoint.snapshot import Snapshot, bytes_of, check_room
from trainer.checkpoint.verify import DamagedError, check_files
from trainer.checkpoint.write import FolderActivity
from trainer.engine.fragments import Fragment


def test_a_copy_too_big_for_the_machine_is_one_line() -> None:
    """With its bytes and the way out."""
    huge = [Fragment("w", 0, 1 << 58, {"master": torch.empty(0)})]
    assert bytes_of(huge) == 1 << 60
    for take in (lambda: Snapshot(huge, torch.device("cpu")), lambda: check_room([1 << 59, 1 << 59])):
        with pytest.raises(UserError, match=rf"^{1 << 60:,} bytes of host .*checkpoint.background=false") as caught:
            take()
        assert "\n" not in str(caught.value)


def test_room_is_asked_of_the_kernel_for_all_ranks_of_the_node(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       64 kB\nMemAvailable:       4 kB\n")
    check_room([2048, 2048], meminfo)
    with pytest.raises(UserError, match=r"^4,097 bytes of .*2 ranks of this node, 4,096 bytes are available"):
        check_room([2048, 2049], meminfo)
    check_room([1 << 60], tmp_path / "absent")  # a system that does not say


def test_a_big_file_reaches_the_disk_bit_by_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no fsync takes longer than others believe its rank alive."""
    at: list[int] = []
    sync = os.fsync

    def fsync(fd: int) -> None:
        at.append(os.fstat(fd).st_size)
        sync(fd)

    monkeypatch.setattr(weights, "CHUNK", 100)
    monkeypatch.setattr(weights, "SYNC", 1000)
    monkeypatch.setattr(os, "fsync", fsync)
    body = os.urandom(2550)
    assert weights.write_file(tmp_path / "a", [body[:50], body[50:]])["bytes"] == 2550
    assert at == [1050, 2050, 2550] and (tmp_path / "a").read_bytes() == body


def test_a_disk_that_refuses_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent/a: No such file or directory: give run.dir a disk with room"):
        weights.write_file(tmp_path / "absent" / "a", [b"x"])


def test_a_folder_is_silent_from_its_last_change_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    pulse = FolderActivity(tmp_path)
    now += 5
    assert pulse.silence_s() == 5
    (tmp_path / "a").touch()
    now += 2
    assert pulse.silence_s() == 0
    (tmp_path / "a").write_bytes(b"more")
    now += 3
    assert pulse.silence_s() == 0
    now += 4
    assert pulse.silence_s() == 4


def test_a_manifest_that_may_not_be_read_is_not_damaged(tmp_path: Path) -> None:
    """It would be set aside for what is wrong with this machine; a missing one is damage."""
    with pytest.raises(DamagedError, match=r"manifest\.json: no such file"):
        check_files(tmp_path)
    (tmp_path / "manifest.json").symlink_to("manifest.json")
    with pytest.raises(UserError, match="too many levels") as caught:
        check_files(tmp_path)
    assert not isinstance(caught.value, DamagedError)
