"""Evaluation text is cut out to the character, near-misses stay: against a loop over characters in plain Python."""

from __future__ import annotations

import gzip
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from conf.errors import UserError
from data_pipeline.corpus.document import Document
from data_pipeline.prepare.decontaminate.decontaminate import Decontaminate, Overlaps, report
from data_pipeline.prepare.decontaminate.sets import load_grams
from data_pipeline.prepare.recipe_config import DecontaminateConfig
from data_pipeline.text import hashing
from tests.helpers.plain_words import plain_words, random_text
from tests.helpers.seeds import seeded


def config(path: Path, examples: list[str], **values: int) -> DecontaminateConfig:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in examples))
    return DecontaminateConfig([str(path)], **values)


def cleaned(cfg: DecontaminateConfig, docs: list[Document], folder: Path) -> tuple[Decontaminate, list[Document]]:
    """What the step gives, its counts made of the same documents in two parts."""
    grams = load_grams(cfg)
    for part in (0, 1):
        overlaps = Overlaps(grams)
        overlaps.count(doc.text for doc in docs[part::2])
        overlaps.save(folder / f"{part}")
    step = Decontaminate(cfg, folder)
    return step, list(step.run(docs))


def vocabulary(rng: random.Random, n: int, mark: str) -> list[str]:
    return [mark + "".join(rng.choices("abcdefghij", k=rng.randint(3, 9))) for _ in range(n)]


def variant(rng: random.Random, word: str) -> str:
    """The same word to the n-grams: other case, punctuation inside; it begins and ends with its letters."""
    word = rng.choice((str.upper, str.title, str.lower))(word)
    return rng.choice((word, f"{word[:2]}-{word[2:]}", f"{word[:-1]}'{word[-1:]}"))


def test_planted_overlaps_go_with_their_window(tmp_path: Path) -> None:
    """Each of 200 planted overlaps is removed with its window, and nothing else."""
    seed = seeded()
    rng = random.Random(seed)
    theirs, ours = vocabulary(rng, 4000, "k"), vocabulary(rng, 3000, "")
    examples = [" ".join(rng.choices(theirs, k=rng.randint(13, 60))) for _ in range(200)]
    docs, right = [], []
    for number, example in enumerate(examples):
        left, gap = " ".join(rng.choices(ours, k=150)) + rng.choice((" ", "\n\n", " — ")), example.split()
        at = rng.randrange(len(gap) - 12)
        plant = rng.choice((" ", "\n", ", ")).join(variant(rng, word) for word in gap[at : at + 13])
        text = left + plant + rng.choice((" ", "! ", "\n")) + " ".join(rng.choices(ours, k=150))
        docs.append(Document(text, f"d{number}", metadata={"tokens": 7}))
        pieces = [text[: len(left) - 200].strip(), text[len(left) + len(plant) + 200 :].strip()]
        right += [(f"d{number}#{k}", piece) for k, piece in enumerate(pieces, 1)]
    step, found = cleaned(config(tmp_path / "set.jsonl", examples), docs, tmp_path)
    assert [(doc.id, doc.text) for doc in found] == right, seed
    assert (step.report.taken.documents, step.report.given.documents, step.report.split) == (200, 400, 200)
    assert step.report.given.tokens == 2800  # nobody counts tokens here: each piece says what its document said


def test_none_of_200_near_misses_is_removed(tmp_path: Path) -> None:
    seed = seeded()
    rng = random.Random(seed)
    theirs, ours = vocabulary(rng, 4000, "k"), vocabulary(rng, 3000, "")
    examples = [" ".join(rng.choices(theirs, k=13)) for _ in range(200)]
    texts = []
    for number, example in enumerate(examples):
        gram = example.split()
        pad = [" ".join(rng.choices(ours, k=rng.randrange(80))) for _ in range(2)]
        kind = number % 5
        if kind == 0:  # one word short, at its start or its end
            texts.append(f"{pad[0]} {' '.join(rng.choice((gram[1:], gram[:-1])))} {pad[1]}")
        elif kind == 1:  # one word is another
            gram[rng.randrange(13)] = rng.choice(ours)
            texts.append(f"{pad[0]} {' '.join(gram)} {pad[1]}")
        elif kind == 2:  # one word more between them
            gram.insert(rng.randrange(1, 13), "and")
            texts.append(f"{pad[0]} {' '.join(gram)} {pad[1]}")
        elif kind == 3:  # two words are in another order
            at = rng.randrange(12)
            gram[at : at + 2] = gram[at + 1], gram[at] if gram[at] != gram[at + 1] else "and"
            texts.append(f"{pad[0]} {' '.join(gram)} {pad[1]}")
        else:  # one document ends with what the next begins with
            at = rng.randrange(1, 13)
            texts += [f"{pad[0]} {' '.join(gram[:at])}", f"{' '.join(gram[at:])} {pad[1]}"]
    docs = [Document(text, str(i)) for i, text in enumerate(texts)]
    step, found = cleaned(config(tmp_path / "set.jsonl", examples), docs, tmp_path)
    assert [doc.text for doc in found] == texts, seed
    assert (step.report.split, step.report.dropped) == (0, {})


def plain_cut(text: str, grams: set[tuple[str, ...]], cfg: DecontaminateConfig) -> str | list[str]:
    """Character by character: a reason, or what is left."""
    found, gone = plain_words(text, bare=True), [False] * len(text)
    for i in range(len(found) - cfg.ngram + 1):
        if tuple(word for word, _, _ in found[i : i + cfg.ngram]) in grams:
            for at in range(found[i][1] - cfg.window, found[i + cfg.ngram - 1][2] + cfg.window):
                if 0 <= at < len(text):
                    gone[at] = True
    if not any(gone):
        return [text]
    pieces = [""]
    for char, cut in zip(text, gone, strict=True):
        if cut:
            pieces += [""] * bool(pieces[-1])
        else:
            pieces[-1] += char
    pieces = [piece.strip() for piece in pieces if piece.strip()]
    if len(pieces) > cfg.max_pieces:
        return "in too many pieces"
    return [piece for piece in pieces if len(piece) >= cfg.min_chars] or "nothing left"


def test_random_texts_are_cut_as_by_a_loop_over_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of few different words, so that they overlap in all ways; whatever the size of a block."""
    outcomes: Counter[str] = Counter()
    for _ in range(100):  # each outcome comes in at least one of six
        seed = seeded()
        rng = random.Random(seed)
        monkeypatch.setattr(hashing, "SIZE", rng.choice((20, 100, 1 << 18)))
        examples = [random_text(rng, rng.randrange(1, 12)) for _ in range(6)] + ["the cat ab ß the"]
        cfg = config(
            tmp_path / "set.jsonl",
            examples,
            ngram=rng.randint(1, 5),
            window=rng.randrange(12),
            min_chars=rng.choice((0, 5, 60)),
            max_pieces=rng.randint(1, 6),
            max_documents=rng.randint(1, 8),
        )
        texts = [random_text(rng, rng.randrange(rng.choice((5, 30, 100)))) for _ in range(10)]
        grams = Counter(gram for text in texts for gram in all_grams(text, cfg.ngram))
        rare = {g for e in examples for g in all_grams(e, cfg.ngram) if grams[g] <= cfg.max_documents}
        right = [plain_cut(text, rare, cfg) for text in texts]
        step, found = cleaned(cfg, [Document(text, str(i)) for i, text in enumerate(texts)], tmp_path / "c")
        expected = []
        for i, outcome in enumerate(right):
            if not isinstance(outcome, str):
                expected += [(f"{i}#{k}" if len(outcome) > 1 else f"{i}", t) for k, t in enumerate(outcome, 1)]
        assert [(doc.id, doc.text) for doc in found] == expected, seed
        dropped = Counter(outcome for outcome in right if isinstance(outcome, str))
        assert {reason: tally.documents for reason, tally in step.report.dropped.items()} == dropped, seed
        passage = step.report
        assert passage.given.documents == passage.taken.documents - dropped.total() + passage.split == len(expected)
        outcomes.update(r if isinstance(r, str) else f"{min(len(r), 2)}" for r in right)
    assert set(outcomes) == {"1", "2", "in too many pieces", "nothing left"}, outcomes


def all_grams(text: str, n: int) -> set[tuple[str, ...]]:
    found = [word for word, _, _ in plain_words(text, bare=True)]
    return {tuple(found[i : i + n]) for i in range(len(found) - n + 1)}


@pytest.fixture(autouse=True)
def folder_of_counts(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()


GRAM = " ".join(f"q{i}" for i in range(13))


def test_a_phrase_in_more_than_max_documents_is_left_alone(tmp_path: Path) -> None:
    cfg = config(tmp_path / "set.jsonl", [GRAM])
    for copies, kept in ((10, []), (11, [f"{i}" for i in range(11)])):
        docs = [Document(f"{GRAM} and {GRAM}", str(i)) for i in range(copies)]  # twice in one is one document
        step, found = cleaned(cfg, docs, tmp_path / "c")
        assert [doc.id for doc in found] == kept
        assert sum(tally.documents for tally in step.report.dropped.values()) == copies - len(kept)


def test_too_many_pieces_and_nothing_left_are_two_reasons(tmp_path: Path) -> None:
    """ "In too many pieces" and "nothing left" are two reasons."""
    cfg = config(tmp_path / "set.jsonl", [GRAM])
    filler = "word " * 140  # 700 characters: 300 are left between two cuts
    for cuts, outcome in ((9, 10), (10, "in too many pieces")):
        step, found = cleaned(cfg, [Document(filler + f"{GRAM} {filler}" * cuts, "a")], tmp_path / "c")
        assert len(found) == (outcome if isinstance(outcome, int) else 0)
        assert list(step.report.dropped) == ([outcome] if isinstance(outcome, str) else [])
    for length, left in ((398, []), (399, ["a"])):  # and a space; 200 of them are the window
        text = "x" * length + " " + GRAM
        step, found = cleaned(cfg, [Document(text, "a")], tmp_path / "c")
        assert [doc.id for doc in found] == left and [doc.text for doc in found] == [text[:200]] * len(left)
        assert list(step.report.dropped) == ([] if left else ["nothing left"])


def test_pieces_keep_metadata_and_tokens_are_counted(tmp_path: Path) -> None:
    """Pieces keep the document's metadata, and their tokens are counted again."""
    cfg = config(tmp_path / "set.jsonl", [GRAM])
    filler = "word " * 200
    grams = load_grams(cfg)
    overlaps = Overlaps(grams)
    overlaps.count([GRAM])
    overlaps.save(tmp_path / "c" / "0")
    step = Decontaminate(cfg, tmp_path / "c")
    step.tokens = lambda texts: [len(text.split()) for text in texts]
    found = list(step.run([Document(filler + GRAM + " " + filler, "a", metadata={"url": "u", "tokens": 413})]))
    assert [doc.metadata for doc in found] == [{"url": "u", "tokens": len(doc.text.split())} for doc in found]
    assert found[0].metadata is not found[1].metadata and step.report.given.tokens == 320


def test_the_report_tells_clean_dirty_and_short_examples_apart(tmp_path: Path) -> None:
    seed = seeded()
    rng = random.Random(seed)
    bodies = {}
    for name, lengths in {"long": (20, 40), "middle": (11, 30), "short": (2, 12)}.items():
        bodies[name] = [[rng.choice("abcd") for _ in range(rng.randint(*lengths))] for _ in range(120)]
    for name, examples in bodies.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": " ".join(e)}) + "\n" for e in examples))
    texts = [" ".join(rng.choice("ABcd") for _ in range(400)) for _ in range(40)]
    texts += [" ".join(rng.choice(rng.choice(list(bodies.values())))) for _ in range(30)]
    cfg = DecontaminateConfig([str(tmp_path / "*.jsonl")])
    overlaps = Overlaps(load_grams(cfg))
    overlaps.count(texts)
    body = report(overlaps, cfg)
    assert list(body["sets"]) == [str(tmp_path / f"{name}.jsonl") for name in sorted(bodies)]
    for name, examples in bodies.items():
        fifth = sorted(map(len, examples))[int(0.05 * 119)]  # the lower of the two that the percentile lies between
        n = min(max(fifth, 8), 13)
        seen = set().union(*(all_grams(text, n) for text in texts))
        found = body["sets"][str(tmp_path / f"{name}.jsonl")]
        dirty = [i for i, e in enumerate(examples) if all_grams(" ".join(e), n) & seen]
        short = [i for i, e in enumerate(examples) if len(e) < n]
        assert (found["n"], found["dirty_examples"], found["short_examples"]) == (n, dirty, short), seed
        assert (found["examples"], found["dirty"], found["short"]) == (120, len(dirty), len(short))
        assert found["too_short_to_cut"] == sum(len(e) < 13 for e in examples)
        assert found["clean"] == len({*range(120)} - {*dirty, *short})
    all13 = set().union(*(all_grams(" ".join(e), 13) for examples in bodies.values() for e in examples))
    in_documents = Counter(g for text in texts for g in all_grams(text, 13) & all13)
    common = sum(count > 10 for count in in_documents.values())
    right = {"words": 13, "of_the_sets": len(all13), "in_documents": len(in_documents), "common": common}
    assert body["ngrams"] == right, seed


def test_counts_do_not_depend_on_the_order_of_documents_or_parts(tmp_path: Path) -> None:
    seed = seeded()
    rng = random.Random(seed)
    cfg = config(tmp_path / "set.jsonl", [random_text(rng, 30) for _ in range(10)], ngram=2)
    texts = [random_text(rng, 60) for _ in range(30)]
    grams, sums = load_grams(cfg), []
    for parts in (1, 3, 30):
        folder = tmp_path / str(parts)
        folder.mkdir()
        rng.shuffle(texts)
        for part in range(parts):
            overlaps = Overlaps(grams)
            overlaps.count(texts[part::parts])
            overlaps.save(folder / str(part))
        sums.append(Overlaps.load(grams, folder).counts)
    assert all((counts == sums[0]).all() for counts in sums) and sums[0].any(), seed
    right = Counter(g for text in texts for g in all_grams(text, 2))
    of_sets = set().union(*(all_grams(json.loads(line)["text"], 2) for line in (tmp_path / "set.jsonl").open()))
    first = grams.first[2]
    assert sorted(sums[0][first : first + len(grams.tables[2].keys)].tolist()) == sorted(right[g] for g in of_sets)


def test_counts_of_other_sets_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    grams = load_grams(config(tmp_path / "set.jsonl", [GRAM]))
    with pytest.raises(UserError, match="count the evaluation sets' n-grams first"):
        Overlaps.load(grams, tmp_path / "c")
    Overlaps(grams).save(tmp_path / "c" / "0")
    other = load_grams(config(tmp_path / "other.jsonl", [GRAM.replace("q0", "q")]))
    assert other.size == grams.size
    with pytest.raises(UserError, match=r"0\.counts\.safetensors: counted for other evaluation sets: delete"):
        Overlaps.load(other, tmp_path / "c")
    (path,) = (tmp_path / "c").iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"0\.counts\.safetensors: .*: delete"):
        Overlaps.load(grams, tmp_path / "c")


def test_sets_are_json_lines_and_paragraphs_of_text(tmp_path: Path) -> None:
    """Sets are JSON lines, compressed or not, or paragraphs of text."""
    lines = [
        {"q": "one two", "a": ["three", "four"]},
        {"q": "five", "other": 1},
        {"other": "six"},
        {"q": 7, "a": "eight"},
    ]
    data = "\n".join(map(json.dumps, lines)).encode() + b"\n\n"
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(data))
    (tmp_path / "b.txt").write_text("one two\nthree four\n \n\nfive\n\n")
    grams = load_grams(DecontaminateConfig([f"{tmp_path}/[ab].*"], text_keys=["q", "a"], ngram=3))
    assert [s.lengths.tolist() for s in grams.sets] == [[4, 1, 0, 1], [4, 1]]
    assert len(grams.ids_in(["Two, three: FOUR"])) == 1 and len(grams.ids_in(["two four three"])) == 0
    assert len(grams.tables[3].keys) == 2  # the same two in both


@pytest.mark.parametrize(
    ("name", "data", "line"),
    [
        ("a.jsonl", b'{"t": "x"}\n', r"text_keys=\['text'\]: none is in .*a\.jsonl, which has \['t'\]"),
        ("a.jsonl", b"[1]\n", r"text_keys=\['text'\]: none is in .*a\.jsonl, which has no JSON object"),
        ("a.jsonl", b"", r"text_keys=\['text'\]: none is in .*a\.jsonl, which has no JSON object"),
        ("a.jsonl", b'{"text": ', r"a\.jsonl: cannot be read \(.*\): give JSON lines or UTF-8 text"),
        ("a.jsonl.gz", b"text", r"a\.jsonl\.gz: cannot be read \(.*\): give JSON lines or UTF-8 text"),
        ("a.txt", b"\xff", r"a\.txt: cannot be read \(.*\): give JSON lines or UTF-8 text"),
        ("a.txt", b"--- ...", r"no word in .*a\.txt: leave it out"),
        ("a.csv", b"text", r"a\.csv is a table of .*: give \.txt files and JSON lines"),
    ],
)
def test_what_is_no_evaluation_set_is_refused_in_one_line(tmp_path: Path, name: str, data: bytes, line: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=line) as caught:
        load_grams(DecontaminateConfig([str(tmp_path / name)]))
    assert "\n" not in str(caught.value) and str(caught.value).startswith("decontaminate.")


@pytest.mark.parametrize("key", ["ngram", "window", "min_chars", "max_pieces", "max_documents"])
def test_a_number_that_cannot_be_is_refused(key: str) -> None:
    with pytest.raises(UserError, match=rf"decontaminate\.{key}=-1: give at least"):
        DecontaminateConfig(["a.txt"], **{key: -1})


def test_a_set_of_a_million_words_turns_other_texts_away(tmp_path: Path) -> None:
    """The bit map has room, and the tables find what is there and nothing else."""
    rng = np.random.default_rng(seeded())
    (tmp_path / "big.txt").write_text(" ".join(map(str, rng.integers(0, 1000, 300_000))))
    grams = load_grams(DecontaminateConfig([str(tmp_path / "big.txt")]))
    text = (tmp_path / "big.txt").read_text()
    assert len(grams.ids_in([text])) == grams.size and len(grams.hits([text], [13]).ids) >= 300_000 - 12
    assert len(grams.ids_in([" ".join(map(str, rng.integers(1000, 2000, 300_000)))])) == 0
