"""What `python -m data_pipeline.order checkpoint=RUN` says is what the run was fed."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np

from tests.helpers.fixtures import make_source
from tests.helpers.ranks import ROOT
from tests.system.runs import make_data, pretrain
from trainer.run.journal import read_journal


def documents_of(train: Path) -> dict[str, np.ndarray]:
    """Every document's tokens by its id, from the tars alone."""
    found = {}
    for path in sorted(train.glob("*.tar")):
        with tarfile.open(path) as tar:
            files = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}  # type: ignore[union-attr]
        for name in (name for name in files if name.endswith(".npy")):
            tokens, at = np.load(io.BytesIO(files[name])), 0
            about = json.loads(files[name.replace(".npy", ".json")])
            for document, length in zip(about["ids"], about["tokens"], strict=True):
                found[document] = tokens[at : at + length]
                at += length
    return found


def test_order_of_a_run_names_the_very_tokens_of_each_step(tmp_path: Path) -> None:
    """Two sources, a batch that grows, and a stage of another mixture and shorter windows."""
    make_data(tmp_path / "web")
    rng = np.random.default_rng(1)
    make_source(tmp_path / "books" / "train", [[rng.integers(0, 1024, 400) for _ in range(5)]] * 2, vocab_size=1024)
    run = tmp_path / "run"
    pretrain(
        run,
        "data=mix",
        f"data.path={tmp_path}",
        "data.sources={web: {path: web, weight: 2}, books: {path: books}}",
        "data.stages=[{step: 4, n_ctx: 32, weights: {books: 3}}]",
        "batch_ramp.start=256",
        "batch_ramp.over=1024",
        "max_steps=7",
    )
    assert (run / "mixture.png").read_bytes().startswith(b"\x89PNG")  # also without a tracking server
    argv = [sys.executable, "-m", "data_pipeline.order", f"checkpoint={run}", "json=true", "steps=0:7"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    documents = {name: documents_of(tmp_path / name / "train") for name in ("web", "books")}
    rows = read_journal(run / "metrics.jsonl")
    assert [row.step for row in rows] == list(range(1, 8))  # a row counts the steps that are done
    assert len({line["source"] for line in lines}) == 2
    for row in rows:
        windows = [line for line in lines if line["step"] == row.step - 1]
        assert [line["index"] for line in windows] == list(range(len(windows)))
        assert sum(line["step"] < row.step - 1 for line in lines) == row.metrics["data/position"]
        parts = [documents[w["source"]][name][start:end] for w in windows for name, start, end in w["spans"]]
        fed = np.concatenate(parts).astype("<u2").tobytes()
        n_ctx = 32 if row.step > 4 else 64
        assert len(fed) == 2 * len(windows) * (n_ctx + 1)
        assert zlib.crc32(fed) == row.metrics["data/crc32"], f"step {row.step}"
