"""Pages become text: their main content, repaired, within limits, whatever page was before."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("ftfy", reason="the corpus extra is not installed")
pytest.importorskip("datatrove", reason="the corpus extra is not installed")

import ftfy
from ftfy.badness import MOJIBAKE_CATEGORIES, is_bad

from data_pipeline.corpus.document import Document
from data_pipeline.prepare.extract.extract import Extract
from data_pipeline.prepare.extract.page_text import SUSPECT, best, fast, repairer
from data_pipeline.prepare.recipe_config import Extractor, LimitsConfig
from tests.benchmarks.extraction import quality, read_gold, resiliparse
from tests.helpers.seeds import seeded

BOTH = list(Extractor)
PROSE = "The river rose for three days, and on the fourth the people of the town carried what they had up the hill. "
PAGE = f"""<html><head><title>Flood</title></head><body>
<nav><ul><li><a href=/>Home</a></li><li><a href=/about>About us</a></li></ul></nav>
<article><h1>The flood</h1><p>{PROSE * 3}</p><p>Afterwards: {PROSE * 2}</p></article>
<footer>Copyright nobody. All rights reserved.</footer></body></html>"""


@pytest.fixture(scope="module")
def step_of() -> Iterator[Callable[..., Extract]]:
    """A step that has done nothing yet; its processes may be those of a step before, since they take time to start."""
    started: dict[tuple[object, ...], Extract] = {}

    def make(extractor: Extractor, **limits: float) -> Extract:
        if extractor is Extractor.best:
            pytest.importorskip("trafilatura", reason="the corpus extra is not installed", exc_type=ImportError)
        step = Extract(extractor, LimitsConfig(**limits))
        before = started.setdefault((extractor, *sorted(limits.items())), step)
        step.sandbox = before.sandbox
        return step

    yield make
    for step in started.values():
        step.sandbox.close()


def page(html: bytes | str, charset: str | None = None) -> Document:
    data = html.encode() if isinstance(html, str) else html
    return Document("", "page", metadata={"html": data} | ({"charset": charset} if charset else {}))


def texts(step: Extract, pages: list[bytes]) -> list[str]:
    docs = [page(html) for html in pages]
    reasons = step.apply(docs)
    return [reason or doc.text for doc, reason in zip(docs, reasons, strict=True)]


@pytest.mark.parametrize("extractor", BOTH)
def test_the_main_text_stays_and_what_stands_around_it_goes(
    extractor: Extractor, step_of: Callable[..., Extract]
) -> None:
    doc = page(PAGE, "utf-8")
    assert step_of(extractor).apply([doc]) == [None]
    assert PROSE.strip() in doc.text and doc.text.count("Afterwards") == 1
    assert not any(word in doc.text for word in ("About us", "Copyright", "<"))
    assert doc.metadata == {}


@pytest.mark.parametrize("extractor", BOTH)
def test_encodings_are_repaired_and_line_breaks_made_one(extractor: Extractor, step_of: Callable[..., Extract]) -> None:
    def html(text: str) -> bytes:
        return f"<article><p>{PROSE * 3}</p><p>{PROSE} {text}</p><p>{PROSE * 2}</p></article>".encode()

    wrong = {
        "sÃ© que no": "sé que no",
        "voilÃ\xa0 tout": "voilà tout",
        "donâ€™t go": "don’t go",
        "rock &amp;amp; roll": "rock & roll",
        "zero\ufeffwidth": "zerowidth",
    }
    found = texts(step_of(extractor), [html(text) for text in wrong])
    assert [text for text, right in zip(found, wrong.values(), strict=True) if right not in text] == []
    broken = html("good \x00\x07").replace(b"good", b"g\xff\xfeood")  # no UTF-8
    (text,) = texts(step_of(extractor), [broken])
    assert PROSE.strip() in text and not set(text) & set("\x00\x07\r\x85\u2028\u2029")


def test_text_is_only_repaired(step_of: Callable[..., Extract]) -> None:
    doc = Document("<p>sÃ©</p>\r\nAbout us\u2028Home \ud83d\ude00", "text")
    empty = Document(" \r\n", "text")
    assert step_of(Extractor.fast).apply([doc, empty]) == [None, "no text"]
    assert doc.text == "<p>sé</p>\nAbout us\nHome \N{GRINNING FACE}"


@pytest.mark.parametrize("extractor", BOTH)
def test_a_page_without_text_is_dropped_and_counted(extractor: Extractor, step_of: Callable[..., Extract]) -> None:
    """A page without text is dropped, and counted with its bytes."""
    step = step_of(extractor)
    pages = [b"", b" ", b"<html></html>", PAGE.encode(), b"<script>var x</script>", b"\x00"]
    kept = list(step.run(page(html) for html in pages))
    assert [PROSE.strip() in doc.text for doc in kept] == [True]
    assert (step.report.taken.documents, step.report.given.documents) == (6, 1)
    assert {why: tally.documents for why, tally in step.report.dropped.items()} == {"no text": 5}
    assert step.report.dropped["no text"].bytes == sum(map(len, pages)) - len(PAGE.encode())


TEXT, NONE, LIMITS = {None}, {"no text"}, {"took too long", "took too much memory"}
PATHOLOGICAL: dict[str, tuple[str, dict[Extractor, set[str | None]]]] = {  # a page, and what may become of it
    "a million open elements": ("<div>" * 10**6 + PROSE, {Extractor.fast: LIMITS, Extractor.best: NONE}),
    "half a million attributes": (
        f"<div {' '.join(f'a{i}=1' for i in range(5 * 10**5))}>{PROSE}",
        dict.fromkeys(BOTH, LIMITS),
    ),
    "a million <": ("<" * 10**6, {Extractor.fast: TEXT, Extractor.best: NONE}),
    "a million paragraphs": ("<p>x</p>" * 10**6, dict.fromkeys(BOTH, LIMITS)),
    "nested tables": ("<table><tr><td>x" * 10**5, dict.fromkeys(BOTH, LIMITS | TEXT | NONE)),
    "an open comment": ("<!--" * 10**6, dict.fromkeys(BOTH, NONE)),
    "formatting that is formatted": ("<p><b><i><a>x" * 10**5, dict.fromkeys(BOTH, LIMITS | TEXT | NONE)),
}


@pytest.mark.parametrize("extractor", BOTH)
def test_pathological_pages_cost_only_themselves(extractor: Extractor, step_of: Callable[..., Extract]) -> None:
    """Pathological pages run into a limit; the pages beside them do not."""
    step = step_of(extractor, seconds=0.5, memory_gib=0.2)
    docs = [doc for html, _ in PATHOLOGICAL.values() for doc in (page(html), page(PAGE))]
    found = step.apply(docs)
    assert found[1::2] == [None] * len(PATHOLOGICAL) and len({doc.text for doc in docs[1::2]}) == 1
    became = dict(zip(PATHOLOGICAL, found[::2], strict=True))
    assert {kind: why for kind, why in became.items() if why not in PATHOLOGICAL[kind][1][extractor]} == {}
    assert all(("html" in doc.metadata) is (why is not None) for doc, why in zip(docs, found, strict=True))


@pytest.mark.parametrize("extractor", BOTH)
def test_too_much_memory_is_the_reason_whatever_the_time(extractor: Extractor, step_of: Callable[..., Extract]) -> None:
    """A page that takes too much memory is dropped for that, however much time it has."""
    step = step_of(extractor, seconds=60, memory_gib=0.2)
    html = PATHOLOGICAL["a million paragraphs"][0]
    assert step.apply([page(html), page(PAGE), page(html)]) == ["took too much memory", None, "took too much memory"]


@pytest.mark.slow
@pytest.mark.parametrize("extractor", BOTH)
def test_a_page_of_100_mb_stays_within_the_memory(extractor: Extractor, step_of: Callable[..., Extract]) -> None:
    step = step_of(extractor)
    found = texts(step, [PAGE.encode(), f"<p>{PROSE}</p>".encode() * (10**8 // len(PROSE)), PAGE.encode()])
    assert found[0] == found[2] and PROSE.strip() in found[0]
    assert found[1] in ("took too long", "took too much memory") or PROSE.strip() in found[1]


@pytest.mark.parametrize("extractor", BOTH)
def test_a_text_does_not_depend_on_the_pages_before(
    extractor: Extractor, step_of: Callable[..., Extract], shared_data: Path
) -> None:
    pages = read_gold(shared_data / "web/extraction")[0][:8]
    step = step_of(extractor)
    step.sandbox.close()  # a fresh process
    once = texts(step, pages)
    assert texts(step, [pages[0]] * 5 + pages[::-1]) == [once[0]] * 5 + once[::-1]


# -- repairs


FINEWEB = ftfy.TextFixerConfig(  # datatrove's FTFYFormatter, and line breaks
    fix_latin_ligatures=False, fix_character_width=False, uncurl_quotes=False, normalization=None, explain=False
)
MOJIBAKE = sorted(
    {c for c in (chr(i) for i in range(0x80, 0x10000)) if c in "".join(MOJIBAKE_CATEGORIES.values()) or is_bad(c)}
    | {chr(c) for c in [*range(0x80, 0x180), *range(0x370, 0x460), 0x490, 0x491, 0xFFFD]}
    | set(" aZ.0\n\t漢字ا😀")
)


def test_what_ftfy_holds_for_bad_is_looked_at() -> None:
    missed = [a + b for a in MOJIBAKE for b in MOJIBAKE if is_bad(a + b) and not SUSPECT.search(a + b)]
    assert missed == []
    seed = seeded()
    rng = random.Random(seed)
    triples = ("".join(rng.choices(MOJIBAKE, k=3)) for _ in range(50_000))
    assert [t for t in triples if is_bad(t) and not SUSPECT.search(t)] == [], f"seed {seed}"


def test_repairs_are_ftfys_own() -> None:
    seed = seeded()
    rng, fixed = random.Random(seed), repairer()
    pieces = ["&amp;", "&lt;b&gt;", "&copy", "&#233;", "AT&T", "<", ">", "\n", "\n", "\r\n", "\r", "\x85", "\u2028"]
    pieces += ["\x1b[31m", "\x00", "\x7f", "\ufeff", "\ufffa", "\u206c", "\ud83d", "\ude00"]
    pieces += ["ﬁ", "ＡＢ", "“x”", "’", "e\u0301", "plain words", " ", "a"]
    words = ("déjà vu", "don’t", "naïve — “so”", "Привет", "你好")
    pieces += [word.encode().decode(how, "replace") for word in words for how in ("latin-1", "cp1252", "cp1251")]
    changed = 0
    for _ in range(1500):
        text = "".join(rng.choice(rng.choice((pieces, MOJIBAKE))) for _ in range(rng.randrange(1, 30)))
        expected = ftfy.fix_text(text, FINEWEB)
        assert fixed(text) == expected.strip(), f"seed {seed}: {text!r}"
        changed += expected != text
    assert changed > 300


def test_repairs_of_real_pages_are_ftfys_own(shared_data: Path) -> None:
    fixed = repairer()
    pages, _ = read_gold(shared_data / "web/extraction")
    for html in pages[::6]:
        for how in ("utf-8", "cp1252", "cp1251"):
            text = html.decode(how, "replace")[:30_000]
            assert fixed(text) == ftfy.fix_text(text, FINEWEB).strip()


# -- quality on the gold pages


def test_the_measure_is_that_of_the_article_benchmark() -> None:
    """Worked by hand: 3 of 4 shingles are right, 3 of 6 are found; the second page gives nothing."""
    gold, found = ["a b c d e f g h i", "x y z w"], ["a b c d e f q", ""]
    assert quality(gold, found) == {"precision": 3 / 8, "recall": 3 / 12, "f1": pytest.approx(0.3)}
    assert quality(["a b", "c"], ["a b", "c"])["f1"] == 1


def test_the_measure_gives_resiliparse_what_was_measured_before(shared_data: Path) -> None:
    pages, gold = read_gold(shared_data / "web/extraction")
    text_of, _ = resiliparse()
    assert quality(gold, [text_of(html) for html in pages])["f1"] == pytest.approx(0.924, abs=0.003)


@pytest.mark.parametrize(
    ("extractor", "bar"), [(Extractor.fast, 0.92), pytest.param(Extractor.best, 0.96, marks=pytest.mark.slow)]
)
def test_f1_on_the_gold_pages(
    extractor: Extractor, bar: float, step_of: Callable[..., Extract], shared_data: Path
) -> None:
    pages, gold = read_gold(shared_data / "web/extraction")
    assert quality(gold, texts(step_of(extractor), pages))["f1"] >= bar


def test_gold_pages_are_read_by_name(tmp_path: Path) -> None:
    (tmp_path / "html").mkdir()
    (tmp_path / "ground-truth.json").write_text(json.dumps({"b": {"articleBody": "B"}, "a": {"articleBody": "A"}}))
    for name in "ab":
        (tmp_path / "html" / f"{name}.html.gz").write_bytes(gzip.compress(name.encode()))
    assert read_gold(tmp_path) == ([b"a", b"b"], ["A", "B"])


def test_no_charset_passes_a_page_unextracted(step_of: Callable[..., Extract]) -> None:
    """No charset that a server can name makes a page pass as plain text."""
    page = b"<html><head><title>x</title></head><body><p>Some words of a page that has a few more.</p></body></html>"
    for charset in ("plain", "text/plain", "plain_text"):
        doc = Document("", "x", metadata={"html": page, "charset": charset})
        assert step_of(Extractor.fast).apply([doc]) == [None] and "<" not in doc.text


SENTENCE = "Each of these sentences tells the reader something that belongs to the article. "
MENU = "<ul class=top><li><a href=/>Home</a></li><li><a href=/about>About us</a></li></ul>"
CONTENT = {
    "sentences": "<ul>" + "".join(f"<li>item {i} {SENTENCE}</li>" for i in range(5)) + "</ul>",
    "paragraphs": "<ul>" + "".join(f"<li><p>item {i} {SENTENCE}</p></li>" for i in range(5)) + "</ul>",
    "short items": "<ul>" + "".join(f"<li>item {i}</li>" for i in range(5)) + "</ul>",
    "a link in each": "<ul>" + "".join(f"<li><a href=/{i}>item {i}</a>: {SENTENCE}</li>" for i in range(5)) + "</ul>",
    "nested": "<ul>" + "".join(f"<li>item {i}<ul><li>{SENTENCE}</li></ul></li>" for i in range(5)) + "</ul>",
    "numbered": "<ol>" + "".join(f"<li>item {i} {SENTENCE}</li>" for i in range(5)) + "</ol>",
    "table": "<table>" + "".join(f"<tr><td>item {i}</td><td>{SENTENCE}</td></tr>" for i in range(5)) + "</table>",
    "code": "<pre><code>" + "".join(f"item {i} = f({i})\n" for i in range(5)) + "</code></pre>",
}


@pytest.mark.parametrize("kind", CONTENT)
@pytest.mark.parametrize(
    "around",
    ["<article>{}</article>", "<article><p>{p}{}<p>{p}</article>", "<p>{p}{}<p>{p}", "<div><main>{}</main></div>"],
)
def test_lists_tables_and_code_are_content(kind: str, around: str) -> None:
    page = f"<html><body>{MENU}{around.format(CONTENT[kind], p=SENTENCE * 2)}<footer>{MENU}</footer></body></html>"
    text = fast()(page.encode(), "")
    assert all(f"item {i}" in text for i in range(5)) and "About us" not in text


@pytest.mark.parametrize("kind", ["sentences", "short items", "a link in each", "nested", "numbered"])
@pytest.mark.parametrize("cell", ["<td>{}", "<td>name<td>{}", "<td><p>{p}</p>{}<p>{p}</p>", "<th>{}"])
def test_lists_in_cells_are_content(kind: str, cell: str) -> None:
    table = f"<table><tr>{cell.format(CONTENT[kind], p=SENTENCE * 2)}</table>"
    page = f"<html><body>{MENU}<article><p>{SENTENCE * 3}</p>{table}<p>{SENTENCE * 3}</p></article></body></html>"
    for text_of in (fast(), best()):
        text = text_of(page.encode(), "")
        assert all(f"item {i}" in text for i in range(5)) and "About us" not in text


def test_lists_of_links_are_no_content() -> None:
    links = (
        "<ul>"
        + "".join(f"<li><a href=/{i}>Another story with a headline, number {i}</a></li>" for i in range(5))
        + "</ul>"
    )
    page = f"<html><body><article><p>{SENTENCE * 3}{links}<p>{SENTENCE * 3}</article></body></html>"
    text = fast()(page.encode(), "")
    assert "headline" not in text and text.count(SENTENCE.strip()) == 6
