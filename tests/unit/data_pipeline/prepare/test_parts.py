"""A stage in tasks and parts: every record is accounted for, and one stopped anywhere gives the same bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from conf.errors import UserError
from data_pipeline.corpus.document import Document, Dropped
from data_pipeline.corpus.inputs import Input
from data_pipeline.corpus.report import SAMPLES, Report
from data_pipeline.prepare import parts
from data_pipeline.prepare.funnel import check, funnel, page, row_of
from data_pipeline.prepare.parts import Mark, PartReader, Parts, Read, marks_of
from data_pipeline.prepare.readers import read_published
from data_pipeline.prepare.run import summary
from data_pipeline.prepare.step import Step
from tests.helpers.seeds import seeded


def read_lines(file: Input, start: int) -> Iterator[tuple[Document | Dropped, int]]:
    for n, line in enumerate(file.path.read_text().splitlines()[start:], start):
        name = f"{file.name}:{n}"
        yield (Dropped("broken", name) if line.startswith("!") else Document(line, name)), n + 1


class Odd(Step):
    """Drops numbers that are divisible by 3 or 5; doubles the others."""

    rewrites, batch = True, 7

    def apply(self, docs: Sequence[Document]) -> list[str | None]:
        reasons = [next((f"by {k}" for k in (3, 5) if int(doc.text) % k == 0), None) for doc in docs]
        for doc in docs:
            doc.text = str(2 * int(doc.text))
        return reasons


class Short(Step):
    def apply(self, docs: Sequence[Document]) -> list[str | None]:
        return ["long" if len(doc.text) > 3 else None for doc in docs]


@pytest.fixture
def files(tmp_path: Path) -> list[Input]:
    rng = np.random.default_rng(seeded())
    found = []
    for i, lines in enumerate((0, 40, 1, 0, 97, 3)):
        path = tmp_path / f"{i}.txt"
        path.write_text("".join(f"{'!' * (rng.random() < 0.1)}{rng.integers(1000)}\n" for _ in range(lines)))
        found.append(Input(path, path.name, path.stat().st_size, 0))
    return found


def stage(folder: Path, files: list[Input], read: Read = read_lines) -> Parts:
    steps = [Odd("odd"), Short("short")]
    return Parts(lambda task: files, read, steps, folder / "d", folder / "m", part_bytes=10 * parts.MIN_RECORD)


def content(folder: Path) -> dict[str, bytes]:
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.suffix in (".zst", ".json")}
    for name, body in found.items():
        if name.endswith(".json"):
            mark = json.loads(body)
            for passage in mark["passages"].values():
                del passage["seconds"]
            found[name] = json.dumps(mark).encode()
    return found


def test_every_record_comes_out_or_is_counted_with_a_reason(files: list[Input], tmp_path: Path) -> None:
    stage(tmp_path, files).run()
    lines = [line for file in files for line in file.path.read_text().splitlines()]
    numbers = [int(line) for line in lines if not line.startswith("!")]
    kept = [str(2 * n) for n in numbers if n % 3 and n % 5 and len(str(2 * n)) <= 3]
    docs = [d for p in sorted((tmp_path / "d").iterdir()) for d, _ in read_published(None, Input(p, p.name, 0, 0), 0)]
    assert [doc.text for doc in docs] == kept
    rows = funnel("filter", tmp_path / "m")
    check(rows)
    read, odd, short = (passage for _, _, passage in rows)
    assert (read.taken.documents, read.given.documents) == (len(lines), len(numbers))
    assert {r: t.documents for r, t in odd.dropped.items()} == {
        reason: count
        for reason, count in (
            ("by 3", sum(n % 3 == 0 for n in numbers)),
            ("by 5", sum(n % 3 > 0 == n % 5 for n in numbers)),
        )
        if count
    }
    assert odd.taken.bytes == sum(len(str(n)) for n in numbers) and short.given.bytes == sum(map(len, kept))
    assert [s["text"] for s in odd.samples["by 3"]] == [str(2 * n) for n in numbers if n % 3 == 0][:SAMPLES]


def test_a_stage_stopped_at_any_record_goes_on_to_the_same_bytes(files: list[Input], tmp_path: Path) -> None:
    stage(tmp_path / "whole", files).run()
    expected = content(tmp_path / "whole")
    assert len(marks_of(tmp_path / "whole" / "m", 0)) > 10
    count = 0

    def dying(file: Input, start: int) -> Iterator[tuple[Document | Dropped, int]]:
        nonlocal count
        for item in read_lines(file, start):
            count += 1
            if count % 23 == 0:
                raise KeyboardInterrupt
            yield item

    stops = 0
    while True:
        try:
            stage(tmp_path / "stopped", files, dying).run()
            break
        except KeyboardInterrupt:
            stops += 1
    assert stops > 4 and content(tmp_path / "stopped") == expected


def test_a_kill_between_publications_costs_no_bytes(
    files: list[Input], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage killed between two publications continues to the same bytes."""
    stage(tmp_path / "whole", files).run()
    save, count = Mark.save, [0]

    def dying(self: Mark, path: Path) -> None:
        count[0] += 1
        if count[0] % 3 == 0:
            raise KeyboardInterrupt
        save(self, path)

    monkeypatch.setattr(Mark, "save", dying)
    for _ in range(100):
        try:
            stage(tmp_path / "killed", files).run()
            break
        except KeyboardInterrupt:
            (tmp_path / "killed" / "d" / ".00000-00001.jsonl.zst.77.tmp").touch()
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    assert not [*(tmp_path / "killed" / "d").glob(".*.tmp")]


def test_documents_that_went_missing_are_told() -> None:
    one, two = Report(), Report()
    one.taken.documents = one.given.documents = two.taken.documents = 3
    two.given.documents = 2
    with pytest.raises(RuntimeError, match=r"filter, b: 3 documents came .* 3 went in .* 2 came out and 0 were"):
        check([("filter", "a", one), ("filter", "b", two)])
    two.given.documents, two.taken.documents = 2, 2
    with pytest.raises(RuntimeError, match="3 documents came from the step before, 2 went in"):
        check([("filter", "a", one), ("filter", "b", two)])


@pytest.mark.parametrize("damage", ["cut off", "damaged"])
def test_documents_of_an_earlier_stage_that_are_damaged_are_told(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "00000-00000.jsonl.zst"
    data = bytearray(parts.to_jsonl_zst([Document(f"text {i}", str(i)) for i in range(100)]))
    if damage == "damaged":
        data[len(data) // 2] ^= 255
    path.write_bytes(data if damage == "damaged" else data[:-9])
    with pytest.raises(UserError, match=rf"{path}: {damage}"):
        list(read_published(None, Input(path, path.name, 0, 0), 0))


def test_counted_tokens_are_not_counted_again(tmp_path: Path) -> None:
    """Of a text that an earlier stage counted, and of a page."""
    docs = [
        Document("a b", "0"),
        Document("a b c", "1", metadata={"tokens": 7}),
        Document("", "2", metadata={"html": b"<p>"}),
    ]
    asked: list[str] = []

    def tokens(texts: Sequence[str]) -> list[int]:
        asked.extend(texts)
        return [len(text.split()) for text in texts]

    def read(file: Input, start: int) -> Iterator[tuple[Document | Dropped, int]]:
        yield from ((doc, n) for n, doc in enumerate(docs[start:], start + 1))

    file = Input(tmp_path, "a", 0, 0)
    given = list(PartReader(read, [file], Mark(), 1e9, tokens))  # type: ignore[arg-type]
    assert [doc.metadata.get("tokens") for doc in given] == [2, 7, None] and asked == ["a b"]


def test_a_report_of_links_names_submissions(tmp_path: Path) -> None:
    """Bars are relative to the largest count, and the summary names submissions."""
    links, pages = Report(), Report()
    links.taken.documents, pages.taken.documents, pages.given.documents = 4, 1000, 500
    body = {"corpus": "w", "funnel": [row_of("links", "links", links), row_of("filter", "read", pages)]}
    assert sorted(map(float, re.findall(r"width: ([0-9.]+)%\"", page(body)))) == [0, 50]
    (tmp_path / "report.json").write_text(json.dumps(body))
    assert "500 documents, 0 bytes, 0 tokens, of 4 submissions;" in summary(tmp_path)
