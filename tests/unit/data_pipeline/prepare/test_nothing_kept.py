"""A recipe that keeps nothing is a failure that names the largest reason, and has its report all the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("datatrove", reason="the corpus extra is not installed")

from conf.errors import UserError
from conf.schema import load
from data_pipeline.prepare.prepare_config import PrepareConfig
from data_pipeline.prepare.run import prepare


def test_a_run_that_keeps_nothing_fails_and_says_why(tmp_path: Path) -> None:
    lines = ["{damaged", *(json.dumps({"text": f"short {i}"}) for i in range(5))]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    words = [f"input={tmp_path / 'in.jsonl'}", f"output={tmp_path / 'out'}", "tokenizer=null", "executor.workers=1"]
    cfg = load(PrepareConfig, ["corpus=jsonl", *words, "corpus.recipe.length.min_chars=100"])
    for _ in range(2):  # the same command again says the same
        with pytest.raises(UserError) as refused:
            prepare(cfg)
        assert str(refused.value).startswith(
            "corpus=jsonl: no document is left of 6 records; length dropped most, 5: too few characters: "
        )
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["funnel"][0]["taken"]["documents"] == 6 and (tmp_path / "out" / "report.html").exists()


def test_a_file_without_a_record_fails_too(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("")
    words = [f"input={tmp_path / 'in.jsonl'}", f"output={tmp_path / 'out'}", "tokenizer=null", "executor.workers=1"]
    with pytest.raises(UserError, match="no document is left of 0 records"):
        prepare(load(PrepareConfig, ["corpus=jsonl", *words]))
