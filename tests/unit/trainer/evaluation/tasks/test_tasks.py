"""Every task in conf/task/ describes one; a wrong description, file or limit is one line."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conf.errors import UserError
from tests.helpers.evaluation_data import Documents, write_rows
from tests.helpers.ranks import ROOT
from tests.helpers.seeds import seeded
from trainer.evaluation.evaluation import plan_task
from trainer.evaluation.tasks.description import Data
from trainer.evaluation.tasks.documents import read_documents
from trainer.evaluation.tasks.find import known_tasks, load, load_task, load_tasks

HOW: dict[str, Any] = {"shots": None, "limit": None, "seed": 0}
COUNTS = {"lambada": 5153, "piqa": 1838, "natural_questions": 3610, "squad": 1190, "winograd": 285}


@pytest.mark.parametrize("name", known_tasks())
def test_every_task_is_described_whole(name: str) -> None:
    """Its comment and words say what it asks, its files where they are from; references are shares, not percents."""
    for r in load(name).references:
        assert r.source and (r.metric in ("ppl", "ppl_per_token", "bits", "bleu") or 0 < r.value < 1), r
    for task in load_tasks([name]).values():
        assert task.about and task.data.source and task.data.files
        for sha in (*task.data.files.values(), *task.data.labels.values()):
            assert sha is None or (len(sha) == 64 and int(sha, 16))


def write(folder: Path, body: dict[str, Any]) -> str:
    path = folder / "mine.yaml"
    path.write_text(json.dumps(body), encoding="utf-8")  # JSON is YAML
    return str(path)


BODY: dict[str, Any] = {
    "about": "x",
    "data": {"files": {"a.jsonl": None}, "format": "jsonl"},
    "choices": {"options": ["{{ sol1 }}", "{{ sol2 }}"], "correct": "label", "context": "{{ goal }}"},
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choices": None}, "give exactly one of choices, completion, perplexity, generation; given: none"),
        ({"perplexity": {"unit": "words"}}, "given: choices, perplexity"),
        ({"perplexity": {"unit": "wrods"}, "choices": None}, r"damaged \(perplexity.unit='wrods', not words, tokens"),
        ({"chocies": {}}, r"damaged \(chocies: not known\)"),
        ({"shots": -1}, "shots=-1: give 0 or more"),
        ({"choices": {"correct": "0"}}, "give either options or options_from"),
        ({"data": {"files": {}, "format": "jsonl"}}, "data.files is empty"),
        ({"data": {"files": {"a": None}, "format": "xml"}}, "'xml', not a form of file"),
    ],
)
def test_a_wrong_description_is_one_line(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    body = {key: value for key, value in {**BODY, **change}.items() if value is not None}
    with pytest.raises(UserError, match=message) as caught:
        load_task(write(tmp_path, body))
    assert "mine.yaml" in str(caught.value)


def test_an_unknown_task_names_what_is_near() -> None:
    with pytest.raises(UserError, match=r"tasks=\[lamda\]: no such task.*lambada"):
        load_task("lamda")


def test_a_task_of_your_own_is_planned(tmp_path: Path) -> None:
    rows = Documents(seeded()).piqa(9)
    write_rows(tmp_path / "a.jsonl", rows)
    plan = plan_task("mine.yaml", load_task(write(tmp_path, {**BODY, "where": "label == 1"})), str(tmp_path), **HOW)
    assert [q.number for q in plan.questions] == [i for i, row in enumerate(rows) if row["label"] == 1]


def test_a_task_does_not_change_with_its_place(tmp_path: Path) -> None:
    """The demonstrations are the same, from wherever the description is read."""
    write_rows(tmp_path / "a.jsonl", Documents(seeded()).piqa(30))
    task, how = load_task(write(tmp_path, BODY)), {**HOW, "shots": 3}
    names = ("mine.yaml", str(tmp_path / "mine.yaml"), "other.yaml")
    here, there, other = (
        plan_task(name, task, str(tmp_path), **how).prompts.before(0, lambda _: True) for name in names
    )
    assert here == there != other


def test_the_pages_own_task_is_one(tmp_path: Path) -> None:
    """The example of docs/evaluation.md, on the document that stands below it."""
    page = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```yaml\n(about: .*?)```", page, re.DOTALL)
    (tmp_path / "capitals.yaml").write_text(example)
    (document,) = re.findall(r"for documents such as `(.*?)`", page)
    write_rows(tmp_path / "capitals.jsonl", [json.loads(document)] * 3)
    plan = plan_task("capitals", load_task(str(tmp_path / "capitals.yaml")), str(tmp_path), **HOW)
    shown = "The capital of France is Paris\n\n" * 2
    assert plan.prompts.before(0, lambda _: True) == shown and len(plan.questions) == 3


def test_what_files_lack_is_one_line(tmp_path: Path) -> None:
    data = Data({"a.jsonl": "0" * 64}, "jsonl", source="https://example.org/a")
    with pytest.raises(UserError, match=r"needs a.jsonl: give task_data=.*https://example.org/a"):
        read_documents("t", data, None)
    with pytest.raises(UserError, match=rf"no file {tmp_path}/a.jsonl \(sha256 0+\): give task_data=.*example.org/a"):
        read_documents("t", data, str(tmp_path))
    path = write_rows(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b\u2028c"}])
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(UserError, match=f"has sha256 {found}, not 0+: give the original file"):
        read_documents("t", data, str(tmp_path))
    right = replace(data, files={"a.jsonl": found})
    assert [d["text"] for d in read_documents("t", right, str(tmp_path))] == ["a", "b\u2028c"]
    with pytest.raises(UserError, match=r"2 documents in a\.jsonl, not 3"):
        read_documents("t", replace(right, documents=3), str(tmp_path))
    path.write_text("\n")
    with pytest.raises(UserError, match=r"no document in a\.jsonl"):
        read_documents("t", Data({"a.jsonl": None}, "jsonl"), str(tmp_path))


@pytest.mark.parametrize(
    ("form", "content", "message"),
    [
        ("jsonl", "{", "not jsonl"),
        ("jsonl", "[1]\n", "document 1 is a list, not an object with fields"),
        ("tsv", "a\tb\n1\n", "line 2 has 1 columns, not 2: a, b"),
        ("squad", "{}", "no field 'data'"),
        ("coqa", '{"data": [[]]}', "not coqa"),
        (
            "coqa",
            '{"data": [{"story": "", "questions": [{"input_text": "a"}], "answers": [{"input_text": "b"}], '
            '"additional_answers": {"0": []}}]}',
            "not coqa",
        ),
        ("winograd", '<!DOCTYPE x [<!ENTITY a "aa">]><collection/>', "it declares entities"),
        ("winograd", "<a>", "no element found"),
        ("json", "[" * 100_000, "not json"),
    ],
)
def test_a_damaged_file_is_one_line(form: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_documents("t", Data({"a": None}, form), str(tmp_path))


def test_a_fifo_or_a_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gzip
    import os

    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe: not a regular file"):
        read_documents("t", Data({"pipe": None}, "lines"), str(tmp_path))
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"a" * 100_000))
    monkeypatch.setattr("trainer.evaluation.tasks.documents.MAX_BYTES", 50_000)
    with pytest.raises(UserError, match="more than 50000 bytes once it is unpacked"):
        read_documents("t", Data({"a.gz": None}, "lines"), str(tmp_path))


@pytest.mark.parametrize("name", COUNTS)
def test_the_papers_counts_of_documents(name: str, shared_data: Path) -> None:
    task = load_task(name)
    (file, *_) = task.data.files
    folder = next(path for path in shared_data.rglob(Path(file).name)).parents[len(Path(file).parts) - 1]
    plan = plan_task(name, task, str(folder), **HOW)
    assert len(plan.questions) == COUNTS[name]
    assert plan.prompts.before(3, lambda _: True).count("\n") >= task.shots


def test_a_winograd_schema_is_read_as_it_is_written(shared_data: Path) -> None:
    plan = plan_task("winograd", load_task("winograd"), str(shared_data / "finetune" / "multiple_choice"), **HOW)
    first, second = plan.questions[0].document, plan.questions[1].document
    assert first["before"] == "The city councilmen refused the demonstrators a permit because"
    assert (first["pronoun"], first["after"], first["options"]) == (
        "they",
        "feared violence.",
        ["The city councilmen", "the demonstrators"],
    )
    assert (first["label"], second["label"]) == (0, 1)
