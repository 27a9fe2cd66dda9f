"""Words and sentences, against spaCy's tokenizer and datatrove's use of it."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import numpy as np
import pytest
from datatrove.utils.text import PUNCTUATION_SET, split_into_sentences, split_into_words

from data_pipeline.prepare.text import english, words
from data_pipeline.prepare.text.words import Text, count_sentences
from tests.helpers.seeds import seeded

spacy = pytest.importorskip("spacy", reason="compares with spaCy, which the project itself does not need")

ORTH = 65  # spaCy's key of a token's text
ATOMS = """word Word WORD a I US U.S. x don't he's it’s can not 10 3 1,000 3.5 am km kg m² % $ € US$ °C ° http:// .co @
www.example.com example.org/a?b=c me@site.co.uk 192.168.1.1 8.8.8.8 - -- — – ' ’ “ ” " ( ) [ ] { } < > / \\ | * _ # & +
= ~ ^ : ; , . .. ... … ! ? :) :-( <3 xD Mr. e.g. C++ and/or 😀 © → naïve ÉCOLE straße слово Слово 中文 。 日本 שלום
's 'S 'll n't gonna p.m.""".split()
ODD = """(Mr.) he's, John's. U.S.A. "Yes!", well-known 10am. 5km $1,000.50 http://a.example.com/x?y=1. …and --that's
3-4 word:) e.g., (a) I'd've cannot C++, 9-a.m. ......... :-)) ''' "Stop."' end.Next A.B word…… ’tis ‘s, it's).
1+1=2""".split()


@pytest.fixture(scope="module")
def cut() -> Callable[[str], tuple[str, ...]]:
    tokenizer = spacy.blank("en").tokenizer
    return lambda run: tuple(token.text for token in tokenizer(run))


def test_the_special_cases_are_spacys() -> None:
    rules = spacy.blank("en").tokenizer.rules
    theirs = {text: tuple(part[ORTH] for part in parts) for text, parts in rules.items() if text.strip()}
    assert theirs == english.SPECIAL


@pytest.mark.parametrize("run", ODD)
def test_an_odd_run_is_cut_as_spacy_cuts_it(run: str, cut: Callable[[str], tuple[str, ...]]) -> None:
    assert english.pieces(run) == cut(run)


def test_random_runs_are_cut_as_spacy_cuts_them(cut: Callable[[str], tuple[str, ...]]) -> None:
    seed = seeded()
    rng = Random(seed)
    runs = ["".join(rng.choices(ATOMS, k=rng.randrange(1, 7))) for _ in range(4000)]
    differ = [(run, english.pieces(run), cut(run)) for run in runs if english.pieces(run) != cut(run)]
    assert len(differ) <= 2, f"seed {seed}: {differ}"  # 1 in 30,000 was seen


def test_the_words_of_a_run_are_the_run() -> None:
    seed = seeded()
    rng = Random(seed)
    for _ in range(2000):
        run = "".join(rng.choices([*ATOMS, "\u0301", "\ud800", "\u200b"], k=rng.randrange(1, 30)))
        assert "".join(english.pieces(run)) == run, f"seed {seed}"


@pytest.mark.parametrize("part", [")", ".", "a-", "a@", "'", "a.", ":)"])
def test_a_run_as_long_as_a_page_is_cut(part: str) -> None:
    run = part * (60_000 // len(part))
    assert "".join(english.pieces(run)) == run


def test_words_of_a_text_are_datatroves() -> None:
    text = "Hello, world!  It's\t10am -\nDon't you know Mr. Smith?\n\n\x0bHe'll come.\u3000End… \x85ok"
    assert Text(text).words == split_into_words(text)


@pytest.mark.parametrize(
    "text",
    [
        "One. Two! Three?",
        'He said "Stop." Then he left.',
        "Mr. Smith came. He sat.",
        "Wait... what? No.",
        "No stop at all",
        "Ends with blanks.  ",
        "Ends with one blank. ",
        "A tab at its end.\t",
        "",
        "   ",
        "?! ?! word",
        "One.)) (Two",
        "e.g. this. 3.5 is one. U.S. too.",
        "你好。再见！ हाँ। नहीं।",
    ],
)
def test_sentences_are_counted_as_datatrove_splits_them(text: str) -> None:
    assert count_sentences(text) == len(split_into_sentences(text))


def test_kinds_are_what_a_loop_over_characters_finds() -> None:
    text = Text(" ".join([*ATOMS, "a1", "1", "-x-", "²", "x" * 5000, "ａｂｃ", "\u200b"]))
    assert text.lengths.tolist() == [len(word) for word in text.words]
    assert text.has_letter.tolist() == [any(c.isalpha() for c in word) for word in text.words]
    assert text.is_word.tolist() == [any(c not in PUNCTUATION_SET for c in word) for word in text.words]
    assert text.kinds.dtype == np.int64


def test_the_table_of_runs_stays_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "TABLE", 10)
    table = words.RunTable()
    for i in range(100):
        table[f"run{i}"]
    table["x" * 1000]
    assert len(table) <= 10 and "x" * 1000 not in table
