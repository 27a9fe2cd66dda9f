"""The decision over all keys against a plain one, and what near-duplicates it finds."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save

from conf.errors import UserError
from conf.frozen import thaw
from conf.schema import CONF
from data_pipeline.corpus.document import Document
from data_pipeline.prepare.dedup import near
from data_pipeline.prepare.dedup.clusters import KINDS, LARGEST, SUMMARY, find, reasons
from data_pipeline.prepare.dedup.documents import Other, read_codes
from data_pipeline.prepare.dedup.groups import MEMBER_BYTES
from data_pipeline.prepare.dedup.keys import url_key, words_key, write_keys
from data_pipeline.prepare.dedup.minhash import MinHash
from data_pipeline.prepare.recipe_config import DedupConfig, MinHashConfig, TextMatch
from tests.helpers.duplicates import Sets, edited, jaccard, loose_words, ngrams, random_text, vocabulary, write_parts
from tests.helpers.seeds import seeded

FINEWEB = MinHashConfig(bands=14, rows=8, ngram=5)
GPT3 = MinHashConfig(bands=10, rows=1, ngram=1, min_jaccard=0.8)
SMALL = MinHashConfig(bands=4, rows=2, ngram=2)
URLS = [("http://a.org/x", "https://A.org:443/x/#top"), ("http://a.org/y?b=1", "http://a.org:80/y?b=1"), ("ftp://c/z",)]


@pytest.fixture
def rng() -> random.Random:
    seed = seeded()
    return random.Random(seed)


@dataclass
class Corpus:
    docs: list[Document]
    urls: list[int | None]  # which of URLS


def random_corpus(rng: random.Random, n: int, texts: list[str], words: list[str]) -> Corpus:
    """Of few addresses and few texts, written in different ways or edited a little, with few scores and dates."""
    docs, urls = [], []
    for i in range(n):
        text = rng.choice(texts)
        kind = rng.random()
        if kind < 0.3:
            text = edited(rng, text, words, 0.1)
        elif kind < 0.5:
            text = "  ".join(rng.choice((w, w.upper(), w.title(), w + ",")) for w in text.split()) + "!"
        which = rng.randrange(len(URLS)) if rng.random() < 0.3 else None
        metadata: dict[str, Any] = {} if which is None else {"url": rng.choice(URLS[which])}
        if rng.random() < 0.7:
            metadata["score"] = rng.choice((0.0, 0.25, 0.5))
        if rng.random() < 0.7:
            metadata["date"] = rng.choice(
                ("2001-01-01", "2001-01-01T00:00:01Z", "2020-05-01T02:00:00+02:00", "no date")
            )
        docs.append(Document(text=text if rng.random() < 0.95 else "...", id=str(i), metadata=metadata))
        urls.append(which)
    return Corpus(docs, urls)


DATES = {"2001-01-01": 0, "2001-01-01T00:00:01Z": 1, "2020-05-01T02:00:00+02:00": 2, "no date": 3, None: 3}


Sizes = dict[int, list[int]]
"""By kind, the sizes of its groups, sorted."""


def plain_decision(own: Corpus, others: list[tuple[Corpus, list[int]]], cfg: DedupConfig) -> tuple[list[int], Sizes]:
    """The same decision with dicts, sets and loops over all pairs. `others` with their codes."""
    sizes: Sizes = {}
    corpora = [(k + 1, c, codes) for k, (c, codes) in enumerate(others)] + [(0, own, [0] * len(own.docs))]
    rows = [(k, c, i) for k, c, codes in corpora for i in range(len(c.docs)) if codes[i] == 0]
    code = dict.fromkeys(range(len(own.docs)), 0)

    def settle(groups: list[list[int]], kind: int) -> None:
        sizes[kind] = []
        for group in groups:
            elsewhere = [rows[m][0] for m in group if rows[m][0]]
            mine = [rows[m][2] for m in group if not rows[m][0]]
            if len(mine) > 1 or (mine and elsewhere):
                sizes[kind] = sorted([*sizes[kind], len(mine)])
            if elsewhere:
                code.update({i: kind + 3 * min(elsewhere) for i in mine})
            elif len(mine) > 1:
                meta = [own.docs[i].metadata for i in mine]
                rank = [(-m.get("score", -1.0), DATES[m.get("date")], i) for m, i in zip(meta, mine, strict=True)]
                code.update({i: kind for i in mine if i != min(rank)[2]})

    def alive() -> list[int]:
        return [m for m, (k, _, i) in enumerate(rows) if k or code[i] == 0]

    for kind, wanted in ((1, cfg.url), (2, cfg.text)):
        if wanted:
            groups: dict[Any, list[int]] = {}
            for m in alive():
                _, corpus, i = rows[m]
                key = corpus.urls[i] if kind == 1 else " ".join(loose_words(corpus.docs[i].text)) or None
                if key is not None:
                    groups.setdefault(key, []).append(m)
            settle(list(groups.values()), kind)
    if cfg.minhash:
        bands = MinHash(cfg.minhash).bands_of([corpus.docs[i].text for _, corpus, i in rows]).tolist()
        sets = [ngrams(corpus.docs[i].text, cfg.minhash.ngram) for _, corpus, i in rows]
        linked, threshold = Sets(len(rows)), cfg.minhash.min_jaccard
        for a, b in combinations(alive(), 2):
            same = sum(x == y != 0 for x, y in zip(bands[a], bands[b], strict=True))
            needed = 1 if threshold is None else near.agreement(cfg.minhash)
            if same >= needed and (threshold is None or jaccard(sets[a], sets[b]) >= threshold):
                linked.join_all([a, b])
        left = set(alive())
        settle([[m for m in group if m in left] for group in linked.groups()], 3)
    return [code[i] for i in range(len(own.docs))], sizes


def codes_in(out: Path) -> list[int]:
    return [code for path in sorted(out.glob("*.npy")) for code in read_codes(path).tolist()]


@pytest.mark.parametrize("minhash", [None, SMALL, replace(SMALL, min_jaccard=0.5)], ids=["exact", "near", "compared"])
def test_the_decision_is_that_of_plain_loops_over_all_pairs(
    minhash: MinHashConfig | None, rng: random.Random, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(near, "WINDOW", 100)  # more than there are: all pairs of a bucket
    seen: set[int] = set()
    for trial in range(12):
        words = vocabulary(rng, 60)
        texts = [random_text(rng, words, rng.randint(5, 15)) for _ in range(rng.randint(3, 12))]
        cfg = DedupConfig(trial % 2 == 0, TextMatch.words if trial % 4 > 1 else None, minhash)
        folder = tmp_path / str(trial)
        others, given = [], []
        for k in range(trial % 3):
            corpus = random_corpus(rng, rng.randint(1, 30), texts, words)
            other = folder / f"other{k}"
            write_parts(other / "keys", corpus.docs, cfg, [len(corpus.docs) // 2, -(-len(corpus.docs) // 2)])
            find(other / "keys", [], cfg, other / "codes")
            gone = rng.random() < 0.7
            given.append((corpus, codes_in(other / "codes") if gone else [0] * len(corpus.docs)))
            others.append(Other(f"o{k}", other / "keys", other / "codes" if gone else None))
        own = random_corpus(rng, rng.randint(1, 30), texts, words)
        write_parts(folder / "keys", own.docs, cfg, [len(own.docs) // 3, 0])
        report = find(folder / "keys", others, cfg, folder / "out")
        found, (want, sizes) = codes_in(folder / "out"), plain_decision(own, given, cfg)
        assert found == want, (trial, [own.docs[i] for i in range(len(want)) if found[i] != want[i]])
        for kind, groups in report.groups.items():
            own_sizes = sizes.pop(KINDS[kind])
            assert sorted(size for size, count in groups.sizes.items() for _ in range(count)) == own_sizes
            assert (groups.groups, groups.documents) == (len(own_sizes), sum(own_sizes))
            assert [group["size"] for group in groups.largest] == own_sizes[::-1][:LARGEST]
        assert not sizes
        assert report.stay == want.count(0) and report.documents == len(want)
        names = reasons([other.name for other in others])
        assert report.removed == {names[c]: want.count(c) for c in sorted(set(want) - {0})}
        summary = json.loads((folder / "out" / SUMMARY).read_text())
        assert summary["removed"] == report.removed

        total = len(own.docs) + sum(len(c.docs) for c, _ in given)
        tiny = replace(cfg, memory_gib=(10 * total + 7.5 * MEMBER_BYTES) / 2**30)
        if not (minhash and minhash.min_jaccard):  # whose buckets are cut where they don't fit
            assert find(folder / "keys", others, tiny, folder / "tiny") == report
            assert codes_in(folder / "tiny") == want
        seen |= set(want)
    assert seen >= ({0, 1, 2, 3} if minhash else {0, 1, 2}) and max(seen) > 3


def test_the_same_documents_stay_in_any_order(rng: random.Random, tmp_path: Path) -> None:
    words = vocabulary(rng, 60)
    texts = [random_text(rng, words, 12) for _ in range(20)]
    docs = random_corpus(rng, 120, texts, words).docs
    for i, doc in enumerate(docs):
        doc.metadata["score"] = i / len(docs)  # no ties
    cfg = DedupConfig(True, TextMatch.words, SMALL)
    stays = set()
    for trial in range(4):
        rng.shuffle(docs)
        write_parts(tmp_path / str(trial), docs, cfg, [rng.randrange(100)])
        find(tmp_path / str(trial), [], cfg, tmp_path / f"out{trial}")
        codes = codes_in(tmp_path / f"out{trial}")
        stays.add(tuple(sorted((doc.id, code) for doc, code in zip(docs, codes, strict=True))))
    assert len(stays) == 1 and {code for _, code in stays.pop()} == {0, 1, 2, 3}


def test_planted_near_duplicates_are_found_and_others_are_left(rng: random.Random, tmp_path: Path) -> None:
    """A copy of each document with some of its words replaced: 1-30% of 4,000, to have pairs that differ, and 1-4% of
    1,000, to have pairs that don't. Of those with J >= 0.8 the S-curve finds 97.5% or more, of those below 0.5 0.4%:
    with so many, a fair draw misses a bar of 95% or of 1% once in 10^5 times or less."""
    words, pairs = vocabulary(rng), 5000
    texts = [random_text(rng, words, 100) for _ in range(pairs)]
    copies = [edited(rng, text, words, rng.uniform(0.01, 0.3 if i < 4000 else 0.04)) for i, text in enumerate(texts)]
    docs = [Document(text=text, id=str(i)) for i, text in enumerate(texts + copies)]
    cfg = DedupConfig(minhash=FINEWEB)
    write_parts(tmp_path / "keys", docs, cfg, [1000, 4000])
    report = find(tmp_path / "keys", [], cfg, tmp_path / "out")
    codes = np.array(codes_in(tmp_path / "out"))
    similar = np.array([jaccard(ngrams(a, 5), ngrams(b, 5)) for a, b in zip(texts, copies, strict=True)])
    merged = codes[pairs:] == 3
    assert not codes[:pairs].any()  # the first of each stays
    assert report.groups["nearly the same text"].sizes == {2: int(merged.sum())}  # and no two originals are one
    like, unlike = merged[(similar >= 0.8) & (similar < 1)], merged[similar < 0.5]
    print(f"J >= 0.8: {like.mean():.4f} of {len(like)} pairs found; J < 0.5: {unlike.mean():.4f} of {len(unlike)}")
    assert len(like) > 500 and len(unlike) > 2000
    assert like.mean() >= 0.95 and unlike.mean() <= 0.01


def test_gpt3s_ten_hashes_join_most_similar_pairs_and_no_other(rng: random.Random, tmp_path: Path) -> None:
    """Windows hide few pairs among so many documents; the 10 hashes hide 1 of 100 at the threshold itself."""
    words = vocabulary(rng)
    texts = [random_text(rng, words, 100) for _ in range(250)]
    texts += [edited(rng, text, words, 0.2 * rng.random()) for text in texts]
    rng.shuffle(texts)
    cfg = DedupConfig(minhash=GPT3)
    write_parts(tmp_path / "keys", [Document(text=t, id=str(i)) for i, t in enumerate(texts)], cfg, [100, 300])
    find(tmp_path / "keys", [], cfg, tmp_path / "out")
    gone = {i for i, code in enumerate(codes_in(tmp_path / "out")) if code}
    sets = [set(text.split()) for text in texts]
    linked = Sets(len(texts))
    for a, b in combinations(range(len(texts)), 2):
        if jaccard(sets[a], sets[b]) >= 0.8:
            linked.join_all([a, b])
    want = {i for group in linked.groups() for i in group if i != min(group)}
    assert gone <= want
    assert len(want) > 100 and len(gone) >= 0.9 * len(want)


def test_fineweb_preset_removes_no_more_than_similar_pairs(rng: random.Random, tmp_path: Path) -> None:
    """Bands alone chain documents of a common template into one group; the preset compares each pair."""
    preset = thaw(CONF / "minhash/fineweb.yaml", MinHashConfig)
    template = " ".join(random_text(rng, vocabulary(rng, 4000), 200).split())
    own = vocabulary(rng, 20_000)
    texts = [f"{template} {random_text(rng, own, rng.randrange(15, 75))}" for _ in range(150)]
    sets, linked = [ngrams(text, preset.ngram) for text in texts], Sets(len(texts))
    for a, b in combinations(range(len(texts)), 2):
        if jaccard(sets[a], sets[b]) >= (preset.min_jaccard or 0):
            linked.join_all((a, b))
    wanted = len(linked.groups())
    kept = {
        cfg.min_jaccard: stays(tmp_path / str(cfg.min_jaccard), texts, DedupConfig(minhash=cfg))
        for cfg in (preset, FINEWEB)
    }
    assert wanted <= kept[preset.min_jaccard] < 1.2 * wanted, (wanted, kept)
    assert kept[None] < wanted / 2, (wanted, kept)


def test_little_memory_joins_only_similar_documents(rng: random.Random, tmp_path: Path) -> None:
    """A bucket that does not fit in memory still joins only similar documents."""
    words = vocabulary(rng)
    text = random_text(rng, words, 100)
    docs = [Document(text=edited(rng, text, words, 0.03), id=str(i)) for i in range(60)]
    docs += [Document(text=random_text(rng, words, 100), id=f"other{i}") for i in range(60)]
    cfg = DedupConfig(minhash=GPT3, memory_gib=(10 * 120 + 40 * MEMBER_BYTES) / 2**30)
    write_parts(tmp_path / "keys", docs, cfg, [20, 50])
    find(tmp_path / "keys", [], cfg, tmp_path / "out")
    codes = codes_in(tmp_path / "out")
    assert sum(map(bool, codes[:60])) >= 40 and not any(codes[60:])


def test_documents_that_are_all_the_same_are_one_in_any_memory(tmp_path: Path) -> None:
    docs = [Document(text="the very same words again", id=str(i), metadata={"score": i % 7}) for i in range(500)]
    cfg = DedupConfig(text=TextMatch.words, minhash=FINEWEB, memory_gib=(10 * 500 + 20 * MEMBER_BYTES) / 2**30)
    for name, given in (("text", cfg), ("near", replace(cfg, text=None))):
        write_parts(tmp_path / name, docs, given, [150] * 3)
        report = find(tmp_path / name, [], given, tmp_path / f"{name}-out")
        codes = codes_in(tmp_path / f"{name}-out")
        assert [i for i, code in enumerate(codes) if not code] == [6]  # the first of the best score
        (groups,) = [g for g in report.groups.values() if g.groups]
        members = [{"part": "00000-0000", "row": i} for i in (0, 1, 2, 3, 4)]
        largest = [{"size": 500, "part": "00000-0000", "row": 6, "members": members}]
        assert (groups.sizes, groups.largest) == ({500: 1}, largest)


def test_an_address_is_the_same_however_it_is_written() -> None:
    same = ["http://a.org/b", "https://A.ORG/b/", "http://a.org:80/b#c", " https://a.org:443/b// "]
    assert len({url_key(url) for url in same}) == 1
    others = ["http://a.org/B", "http://a.org/b?c", "http://a.org:8080/b", "https://a.org:80/b", "ftp://a.org/b"]
    others += ["http://[x/b", "http://b.org/b", "http://a.org", "\ud800"]
    assert len({url_key(url) for url in [same[0], *others]}) == 1 + len(others)
    assert url_key(None) == url_key("") == url_key("  ") == 0


def test_a_text_is_the_same_but_for_case_punctuation_and_spaces() -> None:
    same = ["Déjà vu: 12, again", " déjà VU 12\n\nagain!", "déjà—vu (12) a\u00adgain"]
    assert len({words_key(text) for text in same}) == 1
    others = ["deja vu 12 again", "déjà vu 13 again", "déjàvu 12 again", "déjà vu again"]
    assert len({words_key(text) for text in [same[0], *others]}) == 1 + len(others)
    assert words_key("") == words_key(" .\n") == 0


def stays(folder: Path, texts: list[str], cfg: DedupConfig) -> int:
    write_parts(folder / "keys", [Document(text=text, id=str(i)) for i, text in enumerate(texts)], cfg, [1])
    return find(folder / "keys", [], cfg, folder / "out").stay


def test_exact_keeps_texts_that_differ_in_any_character(tmp_path: Path) -> None:
    texts = ["C", "C++", "C#", "c", "a + b", "a - b", "a  + b", "C", "a - b"]
    assert stays(tmp_path / "exact", texts, DedupConfig(text=TextMatch.exact)) == 7
    assert stays(tmp_path / "words", texts, DedupConfig(text=TextMatch.words)) == 2


def test_numbers_tell_tables_apart_if_asked(rng: random.Random, tmp_path: Path) -> None:
    cells = [[rng.randrange(10_000) for _ in range(60)] for _ in range(300)]
    tables = ["\n".join(f"value {n}" for n in row) for row in cells]  # no n-gram of five is without a number
    assert stays(tmp_path / "fineweb", tables, DedupConfig(minhash=FINEWEB)) == 1
    assert stays(tmp_path / "numbers", tables, DedupConfig(minhash=replace(FINEWEB, numbers=True))) == 300
    assert stays(tmp_path / "twice", tables * 2, DedupConfig(minhash=replace(FINEWEB, numbers=True))) == 300


def test_keys_are_the_same_bytes_each_time(tmp_path: Path) -> None:
    """Keys are the same bytes each time, and no other file is left."""
    docs = [Document(text=f"text {i} of some words", id=str(i), metadata={"url": f"http://a/{i}"}) for i in range(9)]
    cfg = DedupConfig(True, TextMatch.words, replace(FINEWEB, min_jaccard=0.7))
    for name in ("a", "b"):
        write_keys(tmp_path / name / "00000-0000.safetensors", docs, cfg)
    written = [path for path in sorted(tmp_path.rglob("*")) if path.is_file()]
    assert [path.name for path in written] == ["00000-0000.safetensors"] * 2
    assert written[0].read_bytes() == written[1].read_bytes()


def test_a_part_without_documents_has_keys_and_codes(tmp_path: Path) -> None:
    cfg = DedupConfig(True, TextMatch.words, replace(FINEWEB, min_jaccard=0.7))
    write_keys(tmp_path / "keys/00000-0000.safetensors", [], cfg)
    report = find(tmp_path / "keys", [], cfg, tmp_path / "out")
    assert (report.documents, report.stay, codes_in(tmp_path / "out")) == (0, 0, [])


def test_what_cannot_be_used_is_told_in_one_line(tmp_path: Path) -> None:
    cfg = DedupConfig(True, TextMatch.words, FINEWEB)
    docs = [Document(text=f"text {i} of some words", id=str(i)) for i in range(9)]
    (path,) = [tmp_path / "keys/00000-0000.safetensors"]
    write_keys(path, docs, cfg)

    def refused(others: list[Other], cfg: DedupConfig, words: str, keys: Path = path.parent) -> None:
        with pytest.raises(UserError, match=words) as caught:
            find(keys, others, cfg, tmp_path / "out")
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()

    refused([], DedupConfig(minhash=replace(FINEWEB, seed=5)), "seed=1.*wanted.*seed=5")
    refused([], DedupConfig(minhash=replace(FINEWEB, min_jaccard=0.5)), "wanted.*n-gram sets")
    refused([], cfg, "nothing: no keys", tmp_path / "nothing")
    refused([Other("o", tmp_path / "o")], cfg, "o: no keys")
    refused([Other("o", path.parent, tmp_path)], cfg, "00000-0000.npy: not a part's removals")
    np.save(tmp_path / "00000-0000.npy", np.zeros(3, np.uint8))
    refused([Other("o", path.parent, tmp_path)], cfg, "3 rows.* has 9")
    refused([], replace(cfg, memory_gib=1e-9), "dedup.memory_gib=1e-09: 9 documents")
    refused([Other("o", path.parent)] * 85, cfg, "dedup.against: 85 corpora")
    with safe_open(path, framework="numpy") as file:
        settings = file.metadata()
    for damaged in (b"", path.read_bytes()[:-5], b"\xff" * 100):
        path.write_bytes(damaged)
        refused([], cfg, "not a keys file")
    path.write_bytes(save({"url": np.zeros(4, np.uint64)}, settings))
    refused([], cfg, "damaged: exact is None")
    for wrong in (0.0, 1.5, float("nan")):
        with pytest.raises(UserError, match=r"minhash\.min_jaccard=.*above 0, 1 at most"):
            replace(FINEWEB, min_jaccard=wrong)
