"""Readers of a stage: each position gives exactly the rest, at a cost that does not grow with what lies before it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.corpus import read
from data_pipeline.corpus.corpus_config import CorpusFormat
from data_pipeline.corpus.document import Dropped
from data_pipeline.corpus.inputs import Input
from data_pipeline.prepare.prepare_config import RawConfig
from data_pipeline.prepare.readers import read_text
from data_pipeline.prepare.recipe_config import LimitsConfig, LinksConfig, RecipeConfig
from data_pipeline.prepare.recipes import filters
from tests.helpers.seeds import seeded


def corpus(kind: CorpusFormat, limits: LimitsConfig | None = None) -> RawConfig:
    return RawConfig("test", kind, "x", recipe=RecipeConfig(limits=limits or LimitsConfig()))


def made(folder: Path, kind: CorpusFormat, rng: Random) -> Input:
    """Some hundred records, a tenth of them none."""
    rows = [{"id": str(i), "text": "" if rng.random() < 0.1 else f"{i} " * rng.randint(1, 900)} for i in range(300)]
    path = folder / f"a.{kind.value}"
    if kind is CorpusFormat.parquet:
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=70)
    else:
        path.write_text("".join(json.dumps(row) + "\n" if rng.random() < 0.95 else "{broken\n" for row in rows))
    return Input(path, path.name, path.stat().st_size, 0)


@pytest.mark.parametrize("kind", [CorpusFormat.jsonl, CorpusFormat.parquet])
def test_each_position_gives_the_rest(kind: CorpusFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = Random(seed := seeded())
    monkeypatch.setattr(read, "BLOCK", 20_000)
    reader, file = partial(read_text, corpus(kind)), made(tmp_path, kind, rng)
    whole = list(reader(file, 0))
    assert len(whole) == 300 and any(isinstance(item, Dropped) for item, _ in whole), f"seed {seed}"
    for at in rng.sample(range(300), 20):
        assert list(reader(file, whole[at][1])) == whole[at + 1 :], (seed, at)


def test_lines_that_were_read_before_are_not_parsed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "BLOCK", 5_000)
    file, parsed = made(tmp_path, CorpusFormat.jsonl, Random(0)), []
    real = read._parse_line
    monkeypatch.setattr(read, "_parse_line", lambda *args: parsed.append(1) or real(*args))
    assert len(list(read_text(corpus(CorpusFormat.jsonl), file, 290))) == 10
    assert len(parsed) < 40


def test_a_text_beyond_the_limit_is_dropped_with_its_knob(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("word " * 300_000)
    found = list(
        read_text(corpus(CorpusFormat.text, LimitsConfig(page_mib=1.0)), Input(path, path.name, 1_500_000, 0), 0)
    )
    assert found == [(Dropped("it is larger than limits.page_mib", "long.txt"), 1)]


def test_fetched_pages_may_have_another_url(tmp_path: Path) -> None:
    """A redirect leads to another; in archives of others, pages that no link leads to are left out."""
    fetched, given = RecipeConfig(links=LinksConfig()), RecipeConfig(links=LinksConfig(pages="pages.warc.gz"))
    assert [step.name for step in filters(fetched, tmp_path)] == []
    assert [step.name for step in filters(given, tmp_path)] == ["links"]
