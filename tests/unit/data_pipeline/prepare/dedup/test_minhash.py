"""MinHash against plain Python: words, n-grams, bands, and the probabilities that the theory promises."""

from __future__ import annotations

import hashlib
import random
from itertools import pairwise

import numpy as np
import pytest

from data_pipeline.prepare.dedup import minhash as module
from data_pipeline.prepare.dedup.minhash import MinHash
from data_pipeline.prepare.recipe_config import MinHashConfig
from data_pipeline.text import hashing
from data_pipeline.text.hashing import WordForm
from tests.helpers.duplicates import (
    CHANCE,
    edited,
    jaccard,
    loose_words,
    ngrams,
    random_text,
    s_curve,
    surprise,
    vocabulary,
)
from tests.helpers.seeds import seeded

FINEWEB = MinHashConfig(bands=14, rows=8, ngram=5)


@pytest.fixture
def rng() -> random.Random:
    seed = seeded()
    return random.Random(seed)


def strange_text(rng: random.Random) -> str:
    """Of letters, accents, digits, marks and spaces of several scripts."""
    alphabet = "aAbBzZéÉñßœİΣσжЖ한글日本0123٣४²·.,;-_!?\"'“”’—…@#$%+=<>|~`^"
    alphabet += " \t\n\r\u00a0\u2003\u3000\x00\x85\u00ad\u200b\u200d\u0301\u0308"
    return "".join(rng.choice(alphabet) for _ in range(rng.choice((0, 1, 2, 5, 30, 200))))


def test_loose_words_are_those_of_regular_expressions(rng: random.Random) -> None:
    """Words in loose form are those of regular expressions over the same text."""
    texts = [strange_text(rng) for _ in range(400)]
    hashes, numbers = hashing.hashes(texts, WordForm.loose)
    want = [loose_words(text) for text in texts]
    assert numbers.tolist() == [i for i, own in enumerate(want) for _ in own]
    seen: dict[str, int] = {}
    for word, found in zip((word for own in want for word in own), hashes.tolist(), strict=True):
        assert seen.setdefault(word, found) == found, word
    assert len(set(seen.values())) == len(seen) > 100


def test_shingles_are_those_of_a_window_within_a_text(rng: random.Random) -> None:
    """Shingles are those of a sliding window, and never cross texts."""
    few = vocabulary(rng, 5)
    texts = [" ".join(rng.choices(few, k=rng.choice((0, 1, 2, 3, 4, 5, 6, 20)))) for _ in range(300)]
    for n in (1, 2, 5):
        hashes, counts = hashing.shingles(texts, n)
        own = [set(part.tolist()) for part in np.split(hashes, np.cumsum(counts)[:-1])]
        grams = [ngrams(text, n) for text in texts]
        for _ in range(2000):
            a, b = rng.randrange(300), rng.randrange(300)
            assert jaccard(own[a], own[b]) == jaccard(grams[a], grams[b]), (n, texts[a], texts[b])


def test_a_text_is_read_the_same_however_it_is_cut(rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [random_text(rng, vocabulary(rng, 50), rng.choice((0, 1, 3, 40, 400))) for _ in range(60)]
    texts += ["", " \n ", "x" * 300, "\ud800 lone"]
    minhash = MinHash(FINEWEB)
    whole, plain = minhash.bands_of(texts), [hashing.plain_form(text) for text in texts]
    one_by_one = np.concatenate([minhash.bands_of([text]) for text in texts])
    assert np.array_equal(whole, one_by_one)
    monkeypatch.setattr(hashing, "SIZE", 350)
    monkeypatch.setattr(module, "BLOCK", 7)
    assert max(len(text) for text in texts) > 2 * hashing.SIZE
    assert np.array_equal(minhash.bands_of(texts), whole)
    cut = [[piece for _, piece in hashing.pieces(text)] for text in texts]
    assert [b"".join(map(hashing.plain_form, own)) for own in cut] == plain
    assert ["".join(own) for own in cut] == texts


def test_a_band_is_the_hash_of_the_least_products_of_its_rows(rng: random.Random) -> None:
    config = MinHashConfig(bands=3, rows=2, ngram=2, seed=rng.randrange(2**32))
    minhash = MinHash(config)
    texts = [random_text(rng, vocabulary(rng, 30), rng.choice((1, 2, 9, 3000))) for _ in range(12)]
    factors = [int(a) for a in minhash.factors[:, 0]]
    hashes, counts = hashing.shingles(texts, 2)
    found = {}
    for own, bands in zip(np.split(hashes, np.cumsum(counts)[:-1]), minhash.bands_of(texts).tolist(), strict=True):
        least = [min(a * (int(x) >> 32 | 1) % 2**32 for x in own) for a in factors]
        for band in range(3):
            assert found.setdefault((band, *least[2 * band : 2 * band + 2]), bands[band]) == bands[band]
    assert len(found) == len(set(found.values())) > 20


def test_only_a_text_without_words_has_no_band() -> None:
    """A text without words has no band; any other text has all of them."""
    bands = MinHash(FINEWEB).bands_of(["", " ... \n", "one", "one two three four five six"])
    assert (bands[:2] == 0).all() and (bands[2:] != 0).all()
    assert MinHash(FINEWEB).bands_of([]).shape == (0, 14)


def test_bands_are_the_same_bytes_on_every_machine() -> None:
    texts = ["It was the best of times, it was the worst of times.", "Déjà vu 1984", "x"]
    found = hashlib.sha256(MinHash(FINEWEB).bands_of(texts).astype("<u8").tobytes()).hexdigest()
    assert found == "b57777f195bf7e64246afc9079b2d0c1f0c17194569cdc14e6f047e722c688b5"
    other = MinHash(MinHashConfig(bands=14, rows=8, ngram=5, seed=2)).bands_of(texts)
    assert not (other == MinHash(FINEWEB).bands_of(texts)).any()


def test_sets_are_sorted_and_have_the_exact_similarity(rng: random.Random) -> None:
    minhash = MinHash(MinHashConfig(bands=10, rows=1, ngram=1, min_jaccard=0.8))
    texts = ["", *(random_text(rng, vocabulary(rng, 40), 60) for _ in range(40)), "..."]
    bands, grams, ends = minhash.bands_and_sets_of(texts)
    assert np.array_equal(bands, minhash.bands_of(texts))
    sets = [grams[a:b].tolist() for a, b in pairwise([0, *ends.tolist()])]
    assert all(own == sorted(set(own)) for own in sets)
    for a, b in zip(range(42), rng.sample(range(42), 42), strict=True):
        assert jaccard(set(sets[a]), set(sets[b])) == jaccard(ngrams(texts[a], 1), ngrams(texts[b], 1))


@pytest.mark.parametrize("common, apart", [(40, 20), (60, 20), (300, 64), (80, 10), (900, 50)])
def test_bands_agree_as_often_as_the_s_curve_says(common: int, apart: int, rng: random.Random) -> None:
    """Sets of words whose similarity is exact by construction, under fresh hashes: J from 0.5 to 0.9."""
    minhash = MinHash(MinHashConfig(bands=14, rows=8, ngram=1, seed=rng.randrange(2**32)))
    total = common + 2 * apart
    similarity = common / total
    pairs = 100_000 // total
    one, other = [], []
    for _ in range(pairs):
        letters = "".join(rng.choices("bcdfghjklmnpqrst", k=12 * total))
        drawn = [letters[at : at + 12] for at in range(0, len(letters), 12)]
        one.append(" ".join(drawn[: common + apart]))
        other.append(" ".join(drawn[:common] + drawn[common + apart :]))
    agree = minhash.bands_of(one) == minhash.bands_of(other)
    p = similarity**8
    assert surprise(int(agree.sum()), [p] * agree.size) > CHANCE
    assert surprise(int(agree.any(axis=1).sum()), [s_curve(similarity)] * pairs) > CHANCE


def test_hashes_agree_as_often_as_sets_and_are_independent(rng: random.Random) -> None:
    """Each hash agrees as often as the Jaccard similarity says, independently of the others."""
    minhash = MinHash(MinHashConfig(bands=112, rows=1, ngram=5, seed=rng.randrange(2**32)))
    known = vocabulary(rng)
    texts = [random_text(rng, known, 150) for _ in range(1000)]
    copies = [edited(rng, text, known, rng.choice((0.02, 0.06, 0.12))) for text in texts]
    similarity = np.array([jaccard(ngrams(a, 5), ngrams(b, 5)) for a, b in zip(texts, copies, strict=True)])
    agree = minhash.bands_of(texts) == minhash.bands_of(copies)
    for hashed in agree.T:
        assert surprise(int(hashed.sum()), similarity.tolist()) > CHANCE / 112
    off = (agree - similarity[:, None]) / np.sqrt(np.maximum(similarity * (1 - similarity), 1e-9))[:, None]
    off = off[(similarity > 0.02) & (similarity < 0.98)]
    together = (off.T @ off)[np.triu_indices(112, 1)] / np.sqrt(len(off))  # of unit variance where they are independent
    assert np.abs(together).max() < 7.5


def test_near_duplicates_are_found_as_often_as_the_s_curve_says(rng: random.Random) -> None:
    known, minhash = vocabulary(rng), MinHash(FINEWEB)
    texts = [random_text(rng, known, 150) for _ in range(2000)]
    copies = [edited(rng, text, known, 0.3 ** rng.uniform(1, 4)) for text in texts]
    chances = [s_curve(jaccard(ngrams(a, 5), ngrams(b, 5))) for a, b in zip(texts, copies, strict=True)]
    found = (minhash.bands_of(texts) == minhash.bands_of(copies)).any(axis=1)
    assert surprise(int(found.sum()), chances) > CHANCE


@pytest.mark.slow
def test_datatroves_signatures_find_pairs_as_often(
    rng: random.Random, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from datatrove.pipeline.dedup import MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.utils.hashing import HashConfig

    peer = MinhashDedupSignature(
        str(tmp_path_factory.mktemp("peer")), MinhashConfig(hash_config=HashConfig(hash_fc="sha1"))
    )
    known, minhash = vocabulary(rng), MinHash(FINEWEB)
    texts = [random_text(rng, known, 120) for _ in range(500)]
    copies = [edited(rng, text, known, 0.3 ** rng.uniform(1, 4)) for text in texts]
    chances = [s_curve(jaccard(ngrams(a, 5), ngrams(b, 5))) for a, b in zip(texts, copies, strict=True)]
    ours = (minhash.bands_of(texts) == minhash.bands_of(copies)).any(axis=1)
    theirs = [
        any(x == y for x, y in zip(*(peer.get_signature(peer.get_shingles(text)) for text in pair), strict=True))
        for pair in zip(texts, copies, strict=True)
    ]
    print(f"expected {sum(chances):.1f}, ours {ours.sum()}, datatrove {sum(theirs)}")
    assert surprise(int(ours.sum()), chances) > CHANCE and surprise(sum(theirs), chances) > CHANCE
    certain = [p > 1 - 1e-9 or p < 1e-9 for p in chances]
    assert [a for a, sure in zip(ours, certain, strict=True) if sure] == [
        b for b, s in zip(theirs, certain, strict=True) if s
    ]
