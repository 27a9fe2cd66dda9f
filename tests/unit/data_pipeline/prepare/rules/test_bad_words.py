"""C4's list of bad words, against datatrove's expression."""

from __future__ import annotations

import re
from pathlib import Path
from random import Random

import pytest

from conf.errors import UserError
from data_pipeline.corpus.document import Document
from data_pipeline.prepare.recipe_config import BadWordsConfig
from data_pipeline.prepare.rules.bad_words import BadWords
from tests.helpers.seeds import seeded

LIST = ["darn", "dog gone", "heck", "f.o.o", "🖕", "bête noire", "s_x"]


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "list").write_text("\n".join(LIST) + "\n\n", encoding="utf-8")
    return str(tmp_path / "list")


def their_decision(entries: list[str], text: str) -> bool:
    """As C4BadWordsFilter builds it for English."""
    return bool(re.search(r"(?:\W|^)({})(?:\W|$)".format("|".join(map(re.escape, entries))), text.lower()))


def test_decisions_are_datatroves(file: str) -> None:
    seed = seeded()
    rng = Random(seed)
    step = BadWords(BadWordsConfig(file=file))
    atoms = [
        "darn",
        "Darn",
        "DOG",
        "dog gone",
        "gone",
        "heck",
        "f.o.o",
        "F.O.O",
        "🖕",
        "Bête",
        "noire",
        "s_x",
        "x",
        "é",
    ]
    seen = set()
    for _ in range(3000):
        text = "".join(
            rng.choice(atoms) + rng.choice(["", " ", ".", "_", "\n", "-"]) for _ in range(rng.randrange(1, 4))
        )
        bad = their_decision(LIST, text)
        seen.add(bad)
        assert step.has_one(text) == bad, f"seed {seed}: {text!r}"
    assert seen == {True, False}


def test_a_share_stays_the_same_documents_each_time(file: str) -> None:
    docs = [Document(text="Oh heck!", id=f"d{i}") for i in range(2000)]
    reasons = BadWords(BadWordsConfig(file=file, keep=0.25)).apply(docs)
    assert set(reasons) == {None, "document_removed_with_badwords"}
    assert 400 < reasons.count(None) < 600
    again = BadWords(BadWordsConfig(file=file, keep=0.25)).apply(docs[::-1])
    assert again == reasons[::-1]
    assert None not in BadWords(BadWordsConfig(file=file)).apply(docs)
    assert set(BadWords(BadWordsConfig(file=file, keep=1.0)).apply(docs)) == {None}


def test_no_file_is_a_mistake_of_the_user() -> None:
    with pytest.raises(UserError, match=r"^bad_words\.file=/nowhere: No such file"):
        BadWords(BadWordsConfig(file="/nowhere"))


def test_c4s_list_finds_each_of_its_entries(shared_data: Path) -> None:
    path = shared_data / "web/lists/badwords.en.txt"
    step = BadWords(BadWordsConfig(file=str(path)))
    for entry in path.read_text(encoding="utf-8").splitlines():
        assert step.has_one(f"So, {entry.upper()}."), entry
        assert not step.has_one(f"zz{entry}zz"), entry
