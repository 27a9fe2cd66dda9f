"""A user's mistake, given to the real commands, ends in one line and exit code 2, and loses nothing.

A disk that is full may have room tomorrow: one line, and exit code 1.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.manifest import read_index
from tests.helpers.ranks import ROOT
from tests.system.runs import TINY, finish, make_data, pretrain, start
from tests.system.test_resume import story
from trainer.run.folder import RunFolder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def refused(module: str, *args: str) -> str:
    """The one line that a command ends with."""
    done = subprocess.run([sys.executable, "-m", module, *args], cwd=ROOT, capture_output=True, text=True, check=False)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[0]


@pytest.mark.parametrize(
    ("override", "operands"),
    [
        ("optim.lrr=1e-3", ["optim.lrr", "optim.lr"]),
        ("max_steps=many", ["max_steps", "many"]),
        ("tokens_per_step=1000", ["tokens_per_step=1000", "model.n_ctx=64", "768 or 1024"]),
        ("tokens_per_step=640", ["tokens_per_step=640", "10 windows", "data.lanes=4"]),
        ("micro_batch_size=3", ["micro_batch_size=3", "8 windows"]),
        ("parallel.zero_stage=0", ["parallel.zero_stage=0", "1, 2 or 3"]),
        ("model.vocab_size=2048", ["vocabulary of 1024", "model.vocab_size=2048"]),
        ("eval.windows=100000", ["eval.windows=100000", "null"]),
        ("optim.schedule.warmup=500", ["warmup=500", "max_steps=3"]),
        ("data.path=nowhere", ["nowhere/train/manifest.json", "data_pipeline.shards write"]),
    ],
)
def test_a_mistake_in_the_config_is_one_line(data: Path, tmp_path: Path, override: str, operands: list[str]) -> None:
    """The line names every operand."""
    common = [*TINY, f"run.dir={tmp_path / 'run'}", "max_steps=3", f"data.path={data}"]
    line = refused("trainer.pretrain", *(c for c in common if c.split("=")[0] != override.split("=")[0]), override)
    assert all(operand in line for operand in operands), line
    assert not (tmp_path / "run").exists()


def test_more_tp_ranks_than_heads_are_refused_on_every_rank(data: Path, tmp_path: Path) -> None:
    args = (f"data.path={data}", "max_steps=3", "parallel.tp=2", "model.n_head=1")
    for code, err in finish(start(tmp_path / "run", *args, ranks=2)):
        assert code == 2
        assert "parallel.tp=2 is more than model.n_head=1" in err


def test_an_empty_corpus_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    out = tmp_path / "tokenizer"
    line = refused("data_pipeline.bpe", "train", "corpus=text", f"corpus.path={tmp_path / 'texts'}", f"output={out}")
    assert str(tmp_path / "texts") in line and "corpus.path" in line


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_flipped_byte_in_a_shard_stops_every_rank(tmp_path: Path, ranks: int) -> None:
    """The shard is named, and the checkpoint stays.

    Only rank 0's lanes meet the bad shards first or alone: the other rank must not wait for it, nor update.
    """
    data, run = make_data(tmp_path / "data"), tmp_path / "run"
    pretrain(run, f"data.path={data}", "max_steps=4", ranks=ranks)
    shard = data / "train" / "00000.tar"
    body = bytearray(shard.read_bytes())
    for block in read_index(shard.with_suffix(".idx.json")).blocks[::3]:
        body[block.offset + block.tokens] ^= 1
    shard.write_bytes(body)
    ended = finish(start(run, f"data.path={data}", "max_steps=400", "checkpoint.every_steps=1000", ranks=ranks))
    lines = [err.strip().splitlines()[-1] for _, err in ended]
    assert [code for code, _ in ended] == [2] * ranks and all("Traceback" not in err for _, err in ended), ended
    assert any("00000.tar" in line for line in lines) and all(line.startswith("error: ") for line in lines), lines
    assert RunFolder(run).latest() == run / "checkpoints" / "step-00000004.gen-0001"


@pytest.mark.slow
def test_a_validation_shard_lost_to_one_rank_stops_both(tmp_path: Path) -> None:
    """At once, and the shard is named.

    Of 8 windows in micro batches of 2, rank 1 reads the last ones: rank 0 must not wait for it in a collective.
    """
    data, run = make_data(tmp_path / "data"), tmp_path / "run"
    shard = data / "val" / "00000.tar"
    body = bytearray(shard.read_bytes())
    blocks = read_index(shard.with_suffix(".idx.json")).blocks
    first = next(n for n in range(len(blocks)) if sum(b.tokens for b in blocks[:n]) > 6 * 64)
    body[blocks[first].offset] ^= 1
    shard.write_bytes(body)
    given = (f"data.path={data}", "max_steps=4", "data.on_bad_shard=skip")
    ended = finish(start(run, *given, ranks=2), timeout_s=90)
    lines = [err.strip().splitlines()[-1] for _, err in ended]
    assert [code for code, _ in ended] == [2, 2] and all("Traceback" not in err for _, err in ended), ended
    assert "another rank could not read its data" in lines[0] and "val/00000.tar" in lines[1], lines


def test_a_run_folder_of_another_model_is_refused_and_kept(data: Path, tmp_path: Path) -> None:
    """The run is refused before training."""
    run = tmp_path / "run"
    pretrain(run, f"data.path={data}", "max_steps=1")
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    line = refused("trainer.pretrain", *TINY, f"run.dir={run}", f"data.path={data}", "max_steps=9", "model.n_layer=3")
    assert "n_layer=2" in line and "3" in line
    for override, operand in {"seed=5": "1337", "data.lanes=2": "4", "max_steps=0": "max_steps=0"}.items():
        args = [a for a in [*TINY, "max_steps=9"] if a.split("=")[0] != override.split("=")[0]]
        assert operand in refused("trainer.pretrain", *args, f"run.dir={run}", f"data.path={data}", override)
    assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 7 MiB: room for three checkpoints of the test model and no fourth."""
    place = tmp_path / "small disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=7m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here ({mounted.stderr.decode().strip()})")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_stops_every_rank_in_one_line(data: Path, tmp_path: Path, small_disk: Path) -> None:
    """The run goes on when there is room."""
    common = (f"data.path={data}", "max_steps=20", "checkpoint.keep=9", "model.dropout=0.1")
    for code, err in finish(start(small_disk / "run", *common, ranks=2)):
        assert code == 1 and "No space left on device" in err and "Traceback" not in err, err
    latest = RunFolder(small_disk / "run").latest()
    assert latest is not None and latest.name == "step-00000012.gen-0001"
    shutil.copytree(small_disk / "run", tmp_path / "run")
    pretrain(tmp_path / "run", *common, ranks=2)
    pretrain(tmp_path / "whole", *common, ranks=2)
    assert story(tmp_path / "run") == story(tmp_path / "whole")


def limited(kib: int, *args: str) -> tuple[int, str]:
    """Exit code and stderr of a command whose address space a shell limits."""
    argv = ["bash", "-c", f'ulimit -v {kib} && exec "$@"', "bash", sys.executable, "-m", "trainer.pretrain", *args]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    return done.returncode, done.stderr


def test_a_model_that_memory_cannot_hold_ends_in_one_line(data: Path, tmp_path: Path) -> None:
    """Before the run folder is claimed."""
    tiny = [value for value in TINY if value != "model=test"]
    args = (*tiny, f"run.dir={tmp_path / 'run'}", "max_steps=3", f"data.path={data}", "model=gpt2_xl")
    code, err = limited(8 * 2**20, *args, "model.vocab_size=1024", "model.n_ctx=64")
    assert (code, err.count("\n")) == (2, 1), err
    assert "ulimit -v 8388608, after all imports, has room for" in err and " GiB a rank for tensors" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_memory_that_ends_in_the_engine_is_one_line(data: Path, tmp_path: Path) -> None:
    """The plan lets it start, for it counts tensors alone: threads and their heaps take address space too."""
    size = ["model.n_layer=12", "model.n_embd=1024", "model.n_head=16"]  # 154 million parameters: 2.3 GiB of states
    size.append("checkpoint.background=false")  # its snapshot is more than the engine has
    args = (*TINY, f"run.dir={tmp_path / 'run'}", "max_steps=3", f"data.path={data}", *size)
    code, err = limited(2**20, *args)
    while code == 2:  # give what the plan asks for, and no more
        need, room = (float(x) for x in re.findall(r"needs ([0-9.]+) GiB.*room for ([0-9.]+)", err)[0])
        limit = int(re.findall(r"ulimit -v ([0-9]+)", err)[0])
        code, err = limited(limit + int((need - room + 0.1) * 2**20), *args)
    assert (code, err.count("\n")) == (1, 1), err
    assert "out of memory" in err and "model=test of 15" in err
