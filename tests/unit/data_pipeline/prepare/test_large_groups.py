"""Large groups of near-duplicates: one line warns of them, and the report shows their members."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("datatrove", reason="the corpus extra is not installed")

from conf.schema import load
from data_pipeline.prepare.prepare_config import PrepareConfig
from data_pipeline.prepare.run import prepare


def test_a_large_group_is_warned_of_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    template = " ".join(f"word{i}" for i in range(200))
    texts = [f"{template} <i>number</i> {i}" for i in range(150)]
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps({"text": t, "id": f"d{i}"}) for i, t in enumerate(texts)))
    words = [f"input={tmp_path / 'in.jsonl'}", f"output={tmp_path / 'out'}", "tokenizer=null", "executor.workers=1"]
    minhash = "corpus.recipe.dedup.minhash={bands: 14, rows: 8, ngram: 5}"
    prepare(load(PrepareConfig, ["corpus=jsonl", *words, minhash]))
    assert "warning: 1 groups of nearly the same text have more than 100 documents, the largest 150" in (
        capsys.readouterr().out
    )
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    (group,) = report["duplicates"]["groups"]["nearly the same text"]["largest"]
    assert (group["size"], group["id"], group["text"]) == (150, "d0", texts[0][:300])
    assert [member["id"] for member in group["members"]] == ["d1", "d2", "d3", "d4", "d5"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "a group of 150, what stays" in page and page.count("word0 word1") >= 6
