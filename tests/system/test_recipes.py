"""Recipes from archives to shards, by the real command: killed, on any number of workers, over Slurm and over Ray."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipeline.corpus.inputs import Input
from data_pipeline.prepare.readers import read_published
from tests.helpers import slurm
from tests.helpers.crawls import SMALL, STEPS, command, crawl, drops, made_by, pages, report, result, run
from tests.helpers.http_server import wait_for
from tests.helpers.ranks import ROOT
from tests.helpers.seeds import seeded


def exam(folder: Path, seed: int, count: int) -> str:
    """The override for an evaluation set that has some of the first archive's paragraphs."""
    made = [page.body.decode() for page in pages(random.Random(f"{seed} 0"), count)]
    examples = [paragraph for body in made[::4] for paragraph in re.findall("<p>(.*?)</p>", body)[:2]]
    (folder / "exam.txt").write_text("\n\n".join(examples))
    return f"corpus.recipe.decontaminate.sets=[{folder / 'exam.txt'}]"


def test_a_crawl_becomes_shards(tmp_path: Path) -> None:
    """Every record is a document or is counted with its reason."""
    seed = seeded()
    source = crawl(tmp_path / "crawl", 3, 60, seed)
    out = made_by(*STEPS, *SMALL, f"input={source}", f"output={tmp_path / 'out'}", "executor.workers=2")
    funnel = report(out)["funnel"]
    assert funnel[0]["taken"]["documents"] == 180, f"seed {seed}"
    for row, following in zip(funnel, [*funnel[1:], None], strict=True):
        lost = sum(tally["documents"] for tally in row["dropped"].values())
        assert row["taken"]["documents"] == row["given"]["documents"] + lost, (seed, row["step"])
        assert following is None or following["taken"] == row["given"], (seed, row["step"])
    expected = sum(made.type == "request" for i in range(3) for made in pages(random.Random(f"{seed} {i}"), 60))
    assert drops(out)["a request record"] == expected, f"seed {seed}"
    assert drops(out)["nearly the same text"] > 0 < drops(out)["the same text"], (seed, drops(out))
    paths = sorted((out / "documents").iterdir())
    docs = [d for p in paths for d, _ in read_published(None, Input(p, p.name, 0, 0), 0)]
    assert len(docs) == funnel[-1]["given"]["documents"] == len({d.id for d in docs}) > 20, f"seed {seed}"
    words = ["write", "corpus=jsonl", f"corpus.path={out / 'documents'}", "tokenizer=gpt2", f"output={tmp_path / 's'}"]
    shards = subprocess.run([sys.executable, "-m", "data_pipeline.shards", *words], cwd=ROOT, capture_output=True)
    assert shards.returncode == 0 and json.loads((tmp_path / "s" / "report.json").read_text())["kept"] == len(docs)
    again = run(*STEPS, *SMALL, f"input={source}", f"output={out}", "corpus.recipe.dedup.url=false")
    assert again.returncode == 2 and again.stderr.count("\n") == 1
    assert "was begun with corpus.recipe.dedup.url=True, now corpus.recipe.dedup.url=False" in again.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["corpus=common_crawl", "input=nowhere"], "input=nowhere: no such file or folder"),
        (["corpus=common_crawl"], "input"),
        (["corpus=common_crawl", "input=.", "executor=slurm"], "executor.partition"),
        (["corpus=common_crawl", "input=.", "corpus.recipe.url.blocklists=[gone]"], "gone"),
        (["corpus=common_crawl", "input=.", "corpus.recipe.language.keep=[xx]"], "lid.176 does not know xx"),
        (["corpus=pydocs"], "is clean text already"),
    ],
)
def test_a_mistake_is_one_line_before_any_work(words: list[str], message: str, tmp_path: Path) -> None:
    done = run(*words, f"output={tmp_path / 'out'}")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr, done.stderr
    assert not (tmp_path / "out" / "work").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_mistake_that_a_worker_finds_is_one_line(workers: int, tmp_path: Path) -> None:
    source = crawl(tmp_path / "crawl", 2, 5, seeded())
    given = [*STEPS, *SMALL, f"input={source}", f"output={tmp_path / 'out'}", f"executor.workers={workers}"]
    out = made_by(*given)
    mark = out / "work" / "filter" / "00001-00000.json"
    mark.write_bytes(mark.read_bytes()[:-20])
    shutil.rmtree(out / "work" / "logs")
    (out / "report.json").unlink()
    done = run(*given)
    after_bar = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and after_bar.startswith(f"error: {mark}: not JSON"), done.stderr
    assert "Traceback" not in done.stderr and not (out / "report.json").exists()


@pytest.mark.slow
def test_kills_and_workers_do_not_change_the_bytes(tmp_path: Path) -> None:
    """Killed ten times, and on 1, 2 and 4 workers, a recipe gives the same bytes."""
    seed = seeded()
    source = crawl(tmp_path / "crawl", 5, 150, seed)
    given = [*STEPS, *SMALL, f"input={source}", exam(tmp_path, seed, 150)]
    expected = result(made_by(*given, f"output={tmp_path / '1'}", "executor.workers=1"))
    cut = report(tmp_path / "1")["funnel"][-2]
    assert cut["step"] == "decontaminate" and cut["given"]["bytes"] < cut["taken"]["bytes"], f"seed {seed}"
    for workers in (2, 4):
        begun = time.monotonic()
        out = made_by(*given, f"output={tmp_path / str(workers)}", f"executor.workers={workers}")
        took = time.monotonic() - begun
        assert result(out) == expected, f"seed {seed}, {workers} workers"
    rng, kills, starts = random.Random(seed), 0, 0
    while kills < 10:
        out = tmp_path / f"killed {starts}"
        while not (out / "report.html").exists():
            process = subprocess.Popen(
                command(*given, f"output={out}", "executor.workers=2"),
                cwd=ROOT,
                stderr=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
            try:
                process.wait(rng.uniform(0.2, 0.6) * took if kills < 10 else None)
            except subprocess.TimeoutExpired:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
            process.wait()
        assert result(out) == expected, f"seed {seed}, after {kills} kills"
        starts += 1


@pytest.mark.slow
def test_two_slurm_nodes_make_the_same_bytes(tmp_path: Path) -> None:
    if why := slurm.missing():
        pytest.skip(f"Slurm cannot be started: {why}")
    source = crawl(tmp_path / "crawl", 4, 40, seed := seeded())
    given = [*STEPS, *SMALL, f"input={source}", exam(tmp_path, seed, 40), "corpus.recipe.dedup.memory_gib=1"]
    expected = result(made_by(*given, f"output={tmp_path / 'here'}"))
    out = tmp_path / "there"
    with slurm.cluster(tmp_path / "slurm") as env:
        words = command(*given, f"output={out}", "executor=slurm", "executor.partition=main", "executor.memory_gib=2")
        done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Slurm job") == 6, done.stdout
        wait_for(lambda: (out / "report.html").exists() or not slurm.said(env, "squeue", "-h"), 240)
        nodes = slurm.said(env, "scontrol", "show", "jobs")
    logs = [path.read_text() for path in out.rglob("slurm_logs/*.out")]
    assert (out / "report.html").exists(), "\n".join(logs)[-3000:]
    assert "NodeList=n1" in nodes and "NodeList=n2" in nodes
    assert result(out) == expected


@pytest.mark.slow
def test_ray_makes_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="ray is not installed: pip install 'gradus[ray]'")
    source = crawl(tmp_path / "crawl", 3, 30, seeded())
    given = [*STEPS, *SMALL, f"input={source}", "corpus.recipe.dedup.memory_gib=1"]
    expected = result(made_by(*given, f"output={tmp_path / 'here'}"))
    out = made_by(*given, f"output={tmp_path / 'there'}", "executor=ray", "executor.memory_gib=2")
    assert result(out) == expected
