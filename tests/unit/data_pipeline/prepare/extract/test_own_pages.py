"""What the extractors keep of lists, tables and code, as docs/corpus.md says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("resiliparse", reason="the corpus extra is not installed")
pytest.importorskip("trafilatura", reason="the corpus extra is not installed")

from data_pipeline.prepare.extract.page_text import best, fast
from tests.benchmarks.extraction import shingles
from tests.benchmarks.own_pages import AROUND, KINDS, own_pages

CORPUS = (Path(__file__).resolve().parents[5] / "docs/corpus.md").read_text(encoding="utf-8")


def test_the_kinds_of_content_kept_are_those_that_are_said() -> None:
    kept: dict[str, set[tuple[str, str]]] = {"fast": set(), "best": set()}
    for name, text_of in (("fast", fast()), ("best", best())):
        for (kind, around), (html, _) in own_pages().items():
            words = re.findall(r"\w+", text_of(html, "utf-8"))
            text = " ".join(words)
            assert "Home page" not in text and "town 0" in text and "town 3" in text, (name, kind, around)
            if all(" ".join(re.findall(r"\w+", line)) in text for line in KINDS[kind][1].splitlines()):
                kept[name].add((kind, around))
    numbers = re.search(r"Of (\d+) pages of our own .*?`fast` keeps (\d+) whole and `best` (\d+)", CORPUS, re.DOTALL)
    assert numbers is not None
    said = [len(own_pages()), len(kept["fast"]), len(kept["best"])]
    assert [int(n) for n in numbers.groups()] == said, kept
    assert {kind for kind, _ in set(own_pages()) - kept["fast"]} == {"links"}
    assert {around for _, around in set(own_pages()) - kept["best"]} == {"div"} < set(AROUND), kept["best"]


def test_gold_texts_of_own_pages_have_the_words_of_the_pages() -> None:
    for html, text in own_pages().values():
        plain = re.sub(r"<nav>.*</nav>|<footer>.*</footer>|<[^>]+>", " ", html.decode()).replace("&lt;", "<")
        assert shingles(plain.replace("&#x27;", "'")) == shingles(text)
