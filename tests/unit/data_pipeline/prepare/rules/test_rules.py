"""The rules on text: each reason, and datatrove's own steps on the same documents."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)

from conf.frozen import thaw
from conf.schema import CONF
from data_pipeline.corpus.document import Document
from data_pipeline.prepare import recipe_config
from data_pipeline.prepare.rules.c4 import C4
from data_pipeline.prepare.rules.fineweb import FineWeb
from data_pipeline.prepare.rules.gopher import GopherQuality, GopherRepetition
from data_pipeline.prepare.rules.length import Length
from data_pipeline.prepare.step import Step
from data_pipeline.prepare.text.repetition import Grams
from data_pipeline.prepare.text.words import Text
from tests.helpers.seeds import seeded
from tests.helpers.texts import corpus, made_worse

PROSE = """It was the habit of the old man to walk down to the harbour before breakfast and look at the boats. He would
stand there, with both hands in his pockets, and say nothing to anyone. The fishermen knew him well and let him be.
One morning a girl asked him what he was waiting for. He thought about that for a while, and then he laughed. "My dear,"
he said, "I have been asking myself the same thing for thirty years." She did not know what to say to that.
They watched the gulls turn over the water until a bell rang in the town and both of them went home to eat."""


def settings(name: str, schema: type) -> Any:
    return thaw(CONF / "rules" / f"{name}.yaml", schema)


def ours(name: str, **changes: Any) -> Step:
    schemas = {
        "gopher_repetition": (recipe_config.GopherRepetitionConfig, GopherRepetition),
        "gopher_quality": (recipe_config.GopherQualityConfig, GopherQuality),
        "c4": (recipe_config.C4Config, C4),
        "fineweb": (recipe_config.FineWebConfig, FineWeb),
    }
    schema, step = schemas[name]
    config = settings(name, schema)
    for key, value in changes.items():
        setattr(config, key, value)
    return step(config)


def peers() -> dict[str, tuple[Step, Any]]:
    """Ours and datatrove's as it comes, but for C4's terminal punctuation, which has both."""
    return {
        "gopher_repetition": (ours("gopher_repetition"), GopherRepetitionFilter()),
        "gopher_quality": (ours("gopher_quality"), GopherQualityFilter()),
        "c4": (ours("c4"), C4QualityFilter(filter_no_terminal_punct=False)),
        "c4 with terminal punctuation": (ours("c4", terminal_punctuation=True), C4QualityFilter()),
        "fineweb": (ours("fineweb"), FineWebQualityFilter()),
    }


def outcome(step: Step, text: str) -> tuple[str | None, str]:
    doc = Document(text=text, id="x")
    (reason,) = step.apply([doc])
    return reason, doc.text


def their_outcome(step: Any, text: str) -> tuple[str | None, str]:
    doc = Document(text=text, id="x")
    kept = step.filter(doc)
    return (None if kept is True else kept[1]), doc.text


def words(n: int, seed: int = 5) -> list[str]:
    rng = Random(seed)
    return ["".join(rng.choices("abcdefghijklmnop", k=rng.randrange(3, 8))) for _ in range(n)]


def with_grams(n: int, times: int) -> str:
    """A text in which one n-gram comes `times` times, and nothing else twice."""
    rest, gram = words(300), [f"{chr(97 + i) * 4}x" for i in range(n)]
    step = len(rest) // times
    return " ".join(" ".join([*rest[i * step : (i + 1) * step], *gram]) for i in range(times))


BULLETS = "\n".join(f"- the {word} have to be here" for word in words(20))
ENDLESS = "\n".join(f"the {word} have to be here with all that we know of it…" for word in words(20))
REASONS = {
    "empty": ("gopher_repetition", ""),
    "dup_para_frac": ("gopher_repetition", "\n\n".join(["Once.", *["Twice and twice."] * 3, PROSE])),
    "dup_para_char_frac": ("gopher_repetition", "\n\n".join([*words(9), PROSE, PROSE])),
    "dup_line_frac": ("gopher_repetition", "\n".join(["a line"] * 4 + PROSE.split("\n"))),
    "dup_line_char_frac": ("gopher_repetition", "\n".join([*words(9), *[PROSE.replace("\n", " ")] * 2])),
    "top_2_gram": ("gopher_repetition", with_grams(2, 60)),
    "gopher_short_doc": ("gopher_quality", "The man and the dog have to be with that cat."),
    "gopher_long_doc": ("gopher_quality", "the and " * 50_001),
    "gopher_below_avg_threshold": ("gopher_quality", "to be of a it " * 30),
    "gopher_above_avg_threshold": ("gopher_quality", "internationalisation " * 60 + "the of " * 20),
    "gopher_too_many_hashes": ("gopher_quality", PROSE + " #tag" * 30),
    "gopher_too_many_ellipsis": ("gopher_quality", PROSE.replace(" the", "... the") + "…" * 20),
    "gopher_too_many_bullets": ("gopher_quality", BULLETS),
    "gopher_too_many_end_ellipsis": ("gopher_quality", ENDLESS),
    "gopher_below_alpha_threshold": ("gopher_quality", PROSE + " 1234" * 40),
    "gopher_enough_stop_words": ("gopher_quality", " ".join(words(100))),
    "lorem_ipsum": ("c4", PROSE + "\nLorem Ipsum dolor sit amet."),
    "curly_bracket": ("c4", PROSE + "\nfunction f() { return 1; }"),
    "too_few_sentences": ("c4", "One line with words. Two sentences in it.\nMr. X came here."),
    "line_punct_ratio": ("fineweb", PROSE.replace(".", "").replace('"', "").replace(",", "")),
    "short_line_ratio": ("fineweb", "\n".join(["Short one."] + [f"The {word} here." for word in words(9)])),
    "char_dup_ratio": ("fineweb", f"{PROSE}\nThis line is here more than once.\nThis line is here more than once."),
    "list_ratio": ("fineweb", "\n".join(f"{word}{'y' * 40} {word}." for word in words(30))),
}  # fmt: skip


@pytest.mark.parametrize("name", ["gopher_repetition", "gopher_quality", "c4", "fineweb"])
def test_prose_passes(name: str) -> None:
    assert outcome(ours(name), PROSE)[0] is None


@pytest.mark.parametrize("reason", REASONS)
def test_each_reason_has_a_document_that_both_drop_for_it(reason: str) -> None:
    name, text = REASONS[reason]
    step, peer = peers()[name]
    assert outcome(step, text)[0] == reason == their_outcome(peer, text)[0]


@pytest.mark.parametrize(("n", "times"), [(3, 20), (4, 14)])
def test_the_most_frequent_n_gram_drops(n: int, times: int) -> None:
    step, peer = ours("gopher_repetition", top_n_grams={n: 0.15}), GopherRepetitionFilter(top_n_grams=((n, 0.15),))
    text = with_grams(n, times)
    assert outcome(step, text)[0] == f"top_{n}_gram" == their_outcome(peer, text)[0]


@pytest.mark.parametrize("n", [5, 6, 7, 8, 9, 10])
def test_duplicated_n_grams_drop(n: int) -> None:
    limits = {m: (0.05 if m == n else 0.99) for m in range(5, 11)}
    step = ours("gopher_repetition", top_n_grams={}, dup_n_grams=limits)
    peer = GopherRepetitionFilter(top_n_grams=(), dup_n_grams=tuple(limits.items()))
    text = with_grams(n + 2, 6)
    assert outcome(step, text)[0] == f"duplicated_{n}_n_grams" == their_outcome(peer, text)[0]


def test_c4_drops_lines_and_keeps_the_rest() -> None:
    odd = f"{PROSE}[12]\n\nonly two\nPlease turn JavaScript on.\nWe use cookies on this site.\n{'x' * 1001} is long."
    reason, text = outcome(ours("c4"), odd)
    assert (reason, text) == (None, PROSE)
    reason, text = outcome(ours("c4", terminal_punctuation=True), f"{PROSE}\nNo stop at its end\nDots at its end...")
    assert text == "\n".join(line for line in PROSE.split("\n") if line.endswith((".", '"')))


def test_c4_without_a_rule_leaves_its_lines() -> None:
    text = f"{PROSE} [1]\nPlease turn JavaScript on {{now}}, lorem ipsum.\nWe use cookies on this site."
    off = dict.fromkeys(("citations", "javascript", "policy", "lorem_ipsum", "curly_bracket"), False)
    assert outcome(ours("c4", **off), text) == (None, text)


@pytest.mark.parametrize(
    ("config", "text", "reason"),
    [
        (recipe_config.LengthConfig(min_chars=4), "abc", "too few characters"),
        (recipe_config.LengthConfig(max_chars=3), "abcd", "too many characters"),
        (recipe_config.LengthConfig(min_tokens=8), "abc", "too few tokens"),
        (recipe_config.LengthConfig(min_chars=3, max_chars=3, min_tokens=7), "abc", None),
    ],
)
def test_length(config: recipe_config.LengthConfig, text: str, reason: str | None) -> None:
    assert Length(config).apply([Document(text=text, id="x", metadata={"tokens": 7})]) == [reason]


def test_decisions_on_fresh_documents_are_datatroves() -> None:
    seed = seeded()
    rng = Random(seed)
    base = [PROSE, f"{PROSE}\n\n{BULLETS}\n\nhttp://example.com/a?b=c — $5, 10am…\n", " ".join(words(200, seed))]
    for text in [*(made_worse(rng, rng.choice(base)) for _ in range(40)), "\n\n", " ", "\n a \n\n\n\n b\n\n\n b\n"]:
        for name, (step, peer) in peers().items():
            if text.strip() or name != "fineweb":
                assert outcome(step, text) == their_outcome(peer, text), f"seed {seed}, {name}: {text!r}"


def test_counts_of_n_grams_are_those_of_a_loop() -> None:
    seed = seeded()
    rng = Random(seed)
    for _ in range(200):
        text = Text(" ".join(rng.choices(["a", "ab", "b", "bc", "c", "abc"], k=rng.randrange(1, 40))))
        grams, n = Grams(text), rng.randrange(2, 6)
        counts = Counter(" ".join(text.words[i : i + n]) for i in range(len(text.words) - n + 1))
        top, times = counts.most_common(1)[0] if counts else ("", 0)
        above = rng.uniform(0, 60)
        expected = len(top) * times
        most = max((len(gram) * times for gram, times in counts.items()), default=0)
        assert grams.most_frequent(n, above) in ({expected} if most > above else {expected, 0}), f"seed {seed}"
        assert grams.duplicated(n) <= grams.covered(n, 0), f"seed {seed}"


@pytest.mark.slow
def test_decisions_on_real_documents_are_datatroves(shared_data: Path) -> None:
    documents = corpus(shared_data, 2000, seed=3, size=1800)
    for name, (step, peer) in peers().items():
        mine, theirs = ([run(one, text) for text in documents] for run, one in ((outcome, step), (their_outcome, peer)))
        differ = [
            f"{i}: {a[0]}, datatrove {b[0]}: {documents[i][:60]!r}"
            for i, (a, b) in enumerate(zip(mine, theirs, strict=True))
            if a[0] != b[0] or (a[0] is None and a[1] != b[1])
        ]
        print(name, len(differ), Counter(reason for reason, _ in theirs))
        assert len(differ) < 0.005 * len(documents), f"{name}: {differ}"
