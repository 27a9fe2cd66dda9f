"""Words, their places and their hashes, against the plain way to say it: one character after the other."""

from __future__ import annotations

import random
import re
import unicodedata

import numpy as np
import pytest

from data_pipeline.text import hashing
from data_pipeline.text.hashing import BASE, SPAN, WordForm, blocks, hashes, ngrams, powers
from tests.helpers.plain_words import plain_words, random_text
from tests.helpers.seeds import seeded

WORD = 1 << 64


def plain_hash(word: str) -> int:
    """The polynomial and the mixing, in Python's integers."""
    value = sum((ord(char) + 2) * pow(BASE, i, WORD) for i, char in enumerate(word)) % WORD
    value ^= value >> 32
    value = value * 0xFF51AFD7ED558CCD % WORD
    return value ^ value >> 29


@pytest.mark.parametrize("form", [WordForm.spark, WordForm.bare])
def test_words_and_hashes_are_those_of_a_loop(form: WordForm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Words, their positions and their hashes are those of a loop over characters."""
    seed = seeded()
    rng = random.Random(seed)
    for size in (20, 61, hashing.SIZE):  # the longest random word has fewer than 20 characters
        monkeypatch.setattr(hashing, "SIZE", size)
        for _ in range(60):
            text = random_text(rng, rng.randrange(120))
            found = [(h, s, e) for b in blocks(text, form) for h, s, e in zip(*map(np.ndarray.tolist, b), strict=True)]
            plain = plain_words(text, form is WordForm.bare)
            assert found == [(plain_hash(w), s, e) for w, s, e in plain], (seed, size, text)


def test_a_character_is_read_as_unicode_says() -> None:
    """All of them: whitespace as in str.isspace, where blocks are cut; categories; the first letter of lower case."""
    every = list(map(chr, range(0x110000)))
    lower = np.array([0 if char.isspace() else ord(char.lower()[0]) + 2 for char in every])
    kind = np.array([unicodedata.category(char) for char in every])
    gone = np.isin(kind, ["Cc", "Cf"]) | np.char.startswith(kind, "P") | np.char.startswith(kind, "S")
    assert np.array_equal(hashing.values_of_characters(WordForm.spark), lower)
    assert np.array_equal(hashing.values_of_characters(WordForm.bare), np.where(gone & (lower != 0), 1, lower))
    assert re.findall(r"\s", "".join(every)) == [char for char in every if char.isspace()]


def test_an_endless_word_is_cut_and_an_empty_text_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "SIZE", 10)
    found = list(blocks("x" * 45 + " y", WordForm.bare))
    assert [(s, e) for b in found for s, e in zip(b.starts.tolist(), b.ends.tolist(), strict=True)] == [
        (0, 20),
        (20, 40),
        (40, 45),
        (46, 47),
    ]
    for text in ("", " \n", "--- !"):
        assert hashes([text], WordForm.bare)[0].tolist() == []


def test_ngrams_share_a_hash_only_if_their_words_are_equal() -> None:
    """N-grams have equal hashes if they have the same words in the same order, and only then."""
    seed = seeded()
    rng = random.Random(seed)
    plain = [f"w{rng.randrange(12)}" for _ in range(3000)]
    found = dict(ngrams(hashes([" ".join(plain)], WordForm.spark)[0], [1, 2, 5, 3000, 3001]))
    assert list(found) == [1, 2, 5, 3000, 3001]
    for n, grams in found.items():
        assert len(grams) == max(0, 3000 - n + 1)
        seen = {tuple(plain[i : i + n]): int(gram) for i, gram in enumerate(grams.tolist())}
        assert [seen[tuple(plain[i : i + n])] for i in range(len(grams))] == grams.tolist(), seed
        assert len(set(seen.values())) == len(seen), seed


def test_powers_are_powers_beyond_what_is_kept() -> None:
    base = random.Random(seeded()).getrandbits(64) | 1
    found = powers(base, 2 * SPAN + 9)
    for k in (0, 1, 2, SPAN - 1, SPAN, SPAN + 1, 2 * SPAN, 2 * SPAN + 8):
        assert int(found[k]) == pow(base, k, 1 << 64), f"base {base}, k {k}"
