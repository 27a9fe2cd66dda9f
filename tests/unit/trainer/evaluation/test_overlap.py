"""Clean and dirty questions: against n-grams of the documents' words in plain Python."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from conf.errors import UserError
from data_pipeline.shards.convert import import_
from data_pipeline.shards.shards_config import ImportConfig, TokenFormat
from tests.helpers.evaluation_data import random_checkpoint, write_rows
from tests.helpers.http_server import serving
from tests.helpers.overlaps import Planted
from tests.helpers.seeds import seeded
from trainer.config.inference import EvaluateConfig, Number
from trainer.distributed.mesh import Mesh
from trainer.distributed.world import World
from trainer.evaluate import evaluate
from trainer.evaluation.encoder import Encoder
from trainer.evaluation.evaluation import Plan
from trainer.evaluation.journal import Journal, Row
from trainer.evaluation.kinds.kind import Outcome
from trainer.evaluation.overlap import Overlap
from trainer.evaluation.scoring import Scoring
from trainer.evaluation.subject import Subject

ALONE = World(rank=0, world_size=1, local_rank=0)
N_CTX = 96


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    planted = Planted(tmp_path_factory.mktemp("planted"), seeded())
    planted.write(planted.folder / "web", planted.folder / "books")
    return planted


def of(planted: Planted) -> list[str]:
    """The two sources, which hold all documents."""
    return [str(planted.folder / name / "shards") for name in ("web", "books")]


def found(planted: Planted, against: list[str], journal: Path) -> dict[str, list[bool]]:
    dirty = Overlap.plan(against, planted.plans()).search(ALONE, journal)
    return {Path(name).stem: marks.tolist() for name, marks in dirty.items()}


def journaled(folder: Path) -> list[str]:
    lines = [line for path in folder.glob("*.jsonl") for line in path.read_text().split("\n")]
    return [json.loads(line)["sha"] for line in lines if line.endswith("}")]


def test_dirty_questions_are_those_of_plain_python(planted: Planted, tmp_path: Path) -> None:
    """Also in a mixture of two sources; n is the 5th percentile of lengths, 8 to 13, of a program's from 1."""
    expected = {name: planted.dirty(name) for name in planted.rows}
    assert all(4 * sum(marks) >= len(marks) and not all(marks) for marks in expected.values()), expected
    web, books = of(planted)
    assert found(planted, [f"{web}/train", books], tmp_path) == expected
    overlap = Overlap.plan([web, books], planted.plans())
    assert {Path(s.name).stem: s.n for s in overlap.grams.sets} == planted.n
    assert planted.n["sums"] < 8 <= planted.n["choose"] < 13 == planted.n["complete"]
    assert overlap.documents == len(planted.documents)


def test_shards_behind_a_url_are_searched_too(planted: Planted, tmp_path: Path) -> None:
    with serving(planted.folder) as server:
        urls = [f"{server.url}/web/shards", f"{server.url}/books/shards"]
        assert found(planted, urls, tmp_path) == {name: planted.dirty(name) for name in planted.rows}


def test_an_interrupted_search_reads_no_shard_again(
    planted: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    against, add = of(planted), Journal.add
    whole = found(planted, against, tmp_path / "whole")
    left = [3]

    def add_some(self: Journal, rows: dict[str, Row]) -> None:
        add(self, rows)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "add", add_some)
    with pytest.raises(KeyboardInterrupt):
        found(planted, against, tmp_path / "again")
    assert len(journaled(tmp_path / "again")) == 3 < len(journaled(tmp_path / "whole"))
    assert found(planted, against, tmp_path / "again") == whole
    assert sorted(journaled(tmp_path / "again")) == sorted(journaled(tmp_path / "whole"))
    assert len(set(journaled(tmp_path / "again"))) == len(journaled(tmp_path / "again"))
    some = Overlap.plan(against, planted.plans("choose")).search(ALONE, tmp_path / "again")  # other n-grams: all anew
    assert some[planted.names["choose"]].tolist() == planted.dirty("choose")


def test_an_end_of_text_inside_a_document_ends_it(planted: Planted, tmp_path: Path) -> None:
    """As in token files of others, whose documents may be pieces of a stream."""
    tokenizer = planted.tokenizer
    text = planted.text_of("complete", planted.rows["complete"][0])
    words = text.split()
    for name, parts in {"cut": [words[:7], words[7:14]], "whole": [words[:14], words[:7]]}.items():
        ids = [i for part in parts for i in [*tokenizer.encode(" ".join(part)), tokenizer.eot_id]]
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"tokens": ids}))
        out = str(tmp_path / name)
        import_(ImportConfig(format=TokenFormat.jsonl, input=f"{out}.jsonl", tokenizer=str(planted.folder), output=out))
        marks = Overlap.plan([out], planted.plans("complete")).search(ALONE, tmp_path / "journal")
        assert marks[planted.names["complete"]].any() == (name == "whole")


def test_figures_of_parts_are_those_of_files_of_their_own(planted: Planted, tmp_path: Path, mesh: Mesh) -> None:
    """And no answer is computed twice for them."""
    _, checkpoint = random_checkpoint(tmp_path, N_CTX, seeded())
    subject = Subject.find(str(checkpoint), None, Number.fp32)
    encoder = Encoder(subject.tokenizer)
    model = subject.on(mesh)
    for weights in model.parameters():
        weights.data *= 4  # so that answers differ

    def run(plan: Plan, journal: Journal) -> Outcome:
        return plan.prepared(encoder, N_CTX)(Scoring(model, journal, 8, subject.tokenizer.decode))

    plans, kept = planted.plans("choose", "complete", "write", "count"), Journal(tmp_path / "journal", 0)
    outcomes = {plan.name: run(plan, kept) for plan in plans}
    answers = journaled(tmp_path / "journal")
    overlap = Overlap.plan(of(planted), plans)
    dirty = overlap.search(ALONE, tmp_path / "overlap")
    overlap.divide(plans, outcomes, dirty, lambda part: run(part, kept))
    assert journaled(tmp_path / "journal") == answers
    for name in ("choose", "complete", "write", "count"):
        rows = planted.rows[name]
        outcome, marks = outcomes[planted.names[name]], planted.dirty(name)
        assert [sample["dirty"] for sample in outcome.samples] == marks
        assert outcome.notes["ngram"] == planted.n[name]
        assert outcome.notes["training_documents"] == len(planted.documents)
        for part, mark in (("clean", False), ("dirty", True)):
            own = tmp_path / part
            write_rows(own / f"{name}.jsonl", [row for row, one in zip(rows, marks, strict=True) if one is mark])
            (alone,) = _planned(planted, own, name)
            assert outcome.parts[part].pop("share") == pytest.approx(np.mean(np.array(marks) == mark))
            figures = {} if name == "count" else run(alone, Journal(None, 0)).figures
            assert outcome.parts[part] == pytest.approx({"n": marks.count(mark), **figures}, rel=1e-6)
            assert name == "count" or outcome.parts[part].keys() == {"n", *outcome.figures}


def _planned(planted: Planted, folder: Path, name: str) -> list[Plan]:
    before, planted.folder = planted.folder, folder
    try:
        return planted.plans(name)
    finally:
        planted.folder = before


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        ("manifest.json", r"against=.*: no manifest\.json there or in its train/: give"),
        ("00000.tar", r"against=.*00000\.tar cannot be read: put it back"),
        ("00000.idx.json", r"against=.*00000\.idx\.json cannot be read: put it back"),
        ("tokenizer.json", r"against: no .*tokenizer\.json, the vocabulary of the shards: put it back"),
    ],
)
def test_shards_that_are_not_whole_are_refused_first(planted: Planted, tmp_path: Path, damage: str, line: str) -> None:
    shutil.copytree(of(planted)[0], tmp_path / "shards")
    (tmp_path / "shards" / "train" / damage).unlink()
    with pytest.raises(UserError, match=line):
        Overlap.plan([str(tmp_path / "shards")], planted.plans("choose"))


def test_a_vocabulary_of_others_is_refused_first(planted: Planted, tmp_path: Path) -> None:
    shutil.copytree(of(planted)[0], tmp_path / "shards")
    path = tmp_path / "shards" / "train" / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "truncation": None, "more": 1}))
    with pytest.raises(UserError, match=r"tokenizer\.json is not the tokenizer that the shards were written with"):
        Overlap.plan([str(tmp_path / "shards")], planted.plans("choose"))
    with pytest.raises(UserError, match=r"against=pipe:cat \{\}: runs a command"):
        Overlap.plan(["pipe:cat {}"], planted.plans("choose"))


def test_a_task_of_the_harness_is_refused_first(planted: Planted, tmp_path: Path) -> None:
    _, checkpoint = random_checkpoint(tmp_path, N_CTX, 0)
    cfg = EvaluateConfig(checkpoint=str(checkpoint), tasks=["lm_eval/piqa"], against=[str(planted.folder)])
    with pytest.raises(UserError, match=r"against= divides our own tasks alone, and lm_eval/piqa is none of them"):
        evaluate(cfg)
