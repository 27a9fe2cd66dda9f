"""MultiRC and ReCoRD: prompts as GPT-3's appendix G prints them, figures as lm-evaluation-harness computes them."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conf.errors import UserError
from tests.helpers.evaluation_data import Documents, Row, random_checkpoint, write_rows
from tests.helpers.seeds import seeded
from trainer.config.inference import Number
from trainer.distributed.mesh import Mesh
from trainer.evaluation.encoder import Encoder
from trainer.evaluation.evaluation import plan_task
from trainer.evaluation.journal import Journal
from trainer.evaluation.kinds.kind import Outcome
from trainer.evaluation.scoring import Scoring
from trainer.evaluation.subject import Subject
from trainer.evaluation.tasks.description import Choices
from trainer.evaluation.tasks.find import load_task

NAMES = ("Rabin", "Yitzhak Rabin", "the U.S.", "US", "Donald Trump", "Trump", "Israel", "An Israel")


def multirc(seed: int) -> list[Row]:
    """SuperGLUE's lines: a passage, its questions, their answers."""
    draws, documents = random.Random(seed), Documents(seed)

    def question(i: int) -> Row:
        answers = [{"text": documents.text(1, 4), "idx": j, "label": draws.randrange(2)} for j in range(1 + i % 3)]
        return {"question": documents.text(3, 6) + "?", "answers": answers, "idx": i}

    return [
        {"idx": p, "version": 1.1, "passage": {"text": documents.text(9, 30), "questions": [*map(question, range(4))]}}
        for p in range(3)
    ]


def record(seed: int) -> list[Row]:
    """SuperGLUE's lines: a passage with the places of its names, of which the last letter is one; some come twice."""
    draws, documents, rows = random.Random(seed), Documents(seed), []
    for p in range(6):
        text, places = documents.text(3, 6), []
        for name in [*draws.sample(NAMES, 5), *draws.sample(NAMES, 2)]:
            text += draws.choice((" ", ".\n@highlight\n"))
            places.append({"start": len(text), "end": len(text) + len(name) - 1})
            text += f"{name} {documents.text(1, 3)}"
        qas = []
        for q in range(2):
            right = [
                {**place, "text": text[place["start"] : place["end"] + 1]} for place in draws.sample(places, 1 + q)
            ]
            query = f"{documents.text(2, 4)} @placeholder {documents.text(2, 4)}"
            qas.append({"query": query, "answers": right, "idx": {"passage": p, "query": q}})
        rows.append({"source": "CNN", "passage": {"text": text, "entities": places}, "qas": qas, "idx": p})
    return rows


def measured(name: str, folder: Path, mesh: Mesh, seed: int) -> tuple[list[Any], Outcome]:
    """Our documents of the files in `folder`, and what a random model knows."""
    _, checkpoint = random_checkpoint(folder, 256, seed, scale=10.0)
    write_rows(folder / "MultiRC/val.jsonl", multirc(seed))
    write_rows(folder / "ReCoRD/val.jsonl", record(seed))
    task = load_task(name)
    task = replace(task, data=replace(task.data, documents=None))
    subject = Subject.find(str(checkpoint), None, Number.fp32)
    scoring = Scoring(subject.on(mesh), Journal(None, 0), 8, subject.tokenizer.decode)
    plan = plan_task(name, task, str(folder), shots=0, limit=None, seed=seed)
    return [q.document for q in plan.questions], plan.prepared(Encoder(subject.tokenizer), 256)(scoring)


def test_multirc_is_scored_by_answers_and_questions(tmp_path: Path, mesh: Mesh) -> None:
    seed = seeded()
    documents, outcome = measured("multirc", tmp_path, mesh, seed)
    metrics = pytest.importorskip("lm_eval.api.metrics", reason="the eval extra is not installed")
    from sklearn.metrics import f1_score

    rows = [
        (body, question, answer)
        for body in multirc(seed)
        for question in body["passage"]["questions"]
        for answer in question["answers"]
    ]
    assert len(rows) == len(outcome.samples) == outcome.n == len(documents)
    predicted = []
    for sample, (body, question, answer) in zip(outcome.samples, rows, strict=True):
        passage = body["passage"]["text"]
        assert sample["context"] == f"READING COMPREHENSION ANSWER KEY\n\n{passage}\n\n{question['question']}\n"
        assert sample["options"] == [f"- [False] {answer['text']}", f"- [True] {answer['text']}"]
        predicted.append(sample["log_p"][1] > sample["log_p"][0])
    labels = [answer["label"] for *_, answer in rows]
    docs = [{"idx": {"paragraph": b["idx"], "question": q["idx"]}, "label": a["label"]} for b, q, a in rows]
    by_question = metrics.acc_all(list(zip(predicted, docs, strict=True)))
    assert outcome.figures["f1"] == pytest.approx(f1_score(labels, predicted), abs=1e-12)
    assert outcome.figures["acc_group"] == pytest.approx(by_question, abs=1e-12) and 0 < by_question < 1
    assert outcome.figures["acc"] == pytest.approx(sum(map(int.__eq__, labels, map(int, predicted))) / len(labels))


def test_record_is_scored_by_the_name_it_chooses(tmp_path: Path, mesh: Mesh) -> None:
    """A name counts in part where another one holds it, and wholly where only articles and marks differ."""
    seed = seeded()
    documents, outcome = measured("record", tmp_path, mesh, seed)
    util = pytest.importorskip("lm_eval.tasks.super_glue.record.t5_utils", reason="the eval extra is not installed")
    rows = [(body["passage"], qa) for body in record(seed) for qa in body["qas"]]
    theirs = []
    for document, sample, (passage, qa) in zip(documents, outcome.samples, rows, strict=True):
        names = {passage["text"][place["start"] : place["end"] + 1] for place in passage["entities"]}
        answers = {answer["text"] for answer in qa["answers"]}
        assert set(document["entities"]) == names and len(document["entities"]) == len(names)
        before, *highlights = passage["text"].split("\n@highlight\n")
        assert sample["context"] == "\n- ".join([before, *highlights]) + "\n"
        assert sample["options"] == [f"- {qa['query'].replace('@placeholder', name)}" for name in document["entities"]]
        assert {document["entities"][i] for i in sample["correct"]} == answers
        chosen = document["entities"][sample["log_p"].index(max(sample["log_p"]))]
        pairs = [(chosen, f"query_{answer}") for answer in answers]
        theirs.append({"exact_match": util.squad_em_agg(pairs), "f1": util.squad_f1_agg(pairs)})
    for name in ("exact_match", "f1"):
        assert [s["right"][name] for s in outcome.samples] == pytest.approx([float(one[name]) for one in theirs])
        mean = sum(float(one[name]) for one in theirs) / len(theirs)
        assert outcome.figures[name] == pytest.approx(mean, abs=1e-12)


def test_a_figure_has_one_meaning() -> None:
    with pytest.raises(UserError, match="texts: true and labels: f1 both name a figure f1: give one of them"):
        Choices("0", options=("a", "b"), texts=True, labels="f1")
