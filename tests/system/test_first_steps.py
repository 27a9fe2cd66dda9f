"""What a new user does to a command: reads its first line, stops it at once, gives a key twice, starts it again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from conf.errors import UserError
from conf.frozen import freeze
from conf.schema import load
from tests.helpers.ranks import ROOT
from trainer.check import Checked
from trainer.config.pretrain import PretrainConfig
from trainer.data.sources import Sources
from trainer.run.folder import RunFolder
from trainer.tracking.sync import config_of


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_a_reader_that_has_read_enough_is_no_error(tmp_path: Path) -> None:
    for i in range(3):
        RunFolder(tmp_path / f"run{i}").take_generation()
    read, write = os.pipe()
    os.close(read)  # the reader has gone before the first line, as `| head -c0` may
    argv = [sys.executable, "-m", "launch.status", f"run_dir={tmp_path}"]
    done = subprocess.run(argv, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, timeout=300)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_stop_while_a_command_still_imports_says_nothing() -> None:
    code = "import conf, os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(60)"
    done = run("-c", f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); {code}")
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")
    assert "ValueError: shown" in run("-c", "import conf; raise ValueError('shown')").stderr


def test_a_key_that_is_given_twice_is_told(tmp_path: Path) -> None:
    done = run("-m", "launch.status", f"run_dir={tmp_path}/none", f"run_dir={tmp_path}", "json=true", "json=true")
    assert done.returncode == 0
    assert done.stderr == f"warning: run_dir={tmp_path}/none and run_dir={tmp_path} are given: the last counts\n"


def test_a_run_that_is_done_says_so_when_started_again() -> None:
    cfg: PretrainConfig = load(PretrainConfig, ["data.path=d", "max_steps=5", "run.name=x"])
    checked = Checked(cfg, Sources({}, {}, None), {"step": 5}, "")
    assert checked.done == "runs/x is done, at step 5 of max_steps=5: give more max_steps to go on"
    assert checked._replace(state={"step": 4}).done == ""


def test_the_doctors_probe_is_no_change_of_the_checkout() -> None:
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("no checkout of git here")
    assert subprocess.run(["git", "check-ignore", "-q", ".doctor-ab12/"], cwd=ROOT).returncode == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes a file of another user")
def test_sync_asks_before_it_sends_to_an_address_of_another(tmp_path: Path) -> None:
    """The config of a folder that somebody else wrote names a server, which would get our credentials."""
    pytest.importorskip("mlflow", reason="the tracking extra is not installed")
    folder = RunFolder(tmp_path)
    folder.metrics.touch()
    cfg: PretrainConfig = load(PretrainConfig, ["data.path=d", "max_steps=5", "tracking=mlflow"])
    folder.config.write_text(freeze(replace(cfg, tracking=replace(cfg.tracking, uri="http://127.0.0.1:9"))))
    os.chown(folder.config, 4711, -1)
    with pytest.raises(
        UserError, match=r"is of another user \(4711\), and its config names http://127.0.0.1:9, which"
    ) as e:
        config_of(folder, None)
    assert "give uri=http://127.0.0.1:9 if you trust it" in str(e.value)
    assert config_of(folder, "http://127.0.0.1:9").tracking.uri == "http://127.0.0.1:9"
