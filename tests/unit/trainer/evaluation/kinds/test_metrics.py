"""Metrics of evaluation beside lm-evaluation-harness's own, and beside twins written another way."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from fractions import Fraction
from types import ModuleType

import pytest

from conf.errors import UserError
from tests.helpers.seeds import seeded
from trainer.evaluation.kinds import metrics

WORDS = (
    "The the A an cat Cat's dog, dog. U.S.A. don't 3.5% the-end theatre an-other – “quoted” 日本 running runs".split()
)


@pytest.fixture(scope="module")
def harness() -> ModuleType:
    return pytest.importorskip("lm_eval.api.metrics", reason="the eval extra is not installed")


def texts(draw: random.Random, n: int, least: int = 0) -> list[str]:
    return ["  ".join(draw.choices(WORDS, k=draw.randint(least, 6))) for _ in range(n)]


def test_answers_are_normalised_as_the_harness_does(harness: ModuleType) -> None:
    from lm_eval.tasks.qasper.metrics import normalize_answer  # the code of SQuAD's script

    some = texts(random.Random(seeded()), 500)
    assert [metrics.normalised(x) for x in some] == [normalize_answer(x) for x in some]
    assert metrics.normalised(" The  U.S.A.'s (an) Answer: 42! ") == "usas answer 42"


def squad_f1(text: str, answer: str) -> Fraction:
    """By precision and recall, as SQuAD's script defines it; each word is struck out as it is matched."""
    words, left = metrics.normalised(text).split(), metrics.normalised(answer).split()
    if not words or not left:
        return Fraction(words == left)
    n, hits = len(left), 0
    for word in words:
        if word in left:
            left.remove(word)
            hits += 1
    precision, recall = Fraction(hits, len(words)), Fraction(hits, n)
    return 2 * precision * recall / (precision + recall) if hits else Fraction(0)


def test_f1_and_exact_match_take_the_answer_that_fits_best() -> None:
    draw = random.Random(seeded())
    seen = set()
    for _ in range(500):
        text, answers = texts(draw, 1)[0], texts(draw, draw.randint(1, 3))
        each = [squad_f1(text, answer) for answer in answers]
        assert metrics.token_f1(text, answers) == pytest.approx(float(max(each)), abs=1e-12)
        same = [metrics.normalised(text) == metrics.normalised(answer) for answer in answers]
        assert metrics.exact_match(text, answers) == float(any(same))
        n = len(answers)
        others = [max((each[j] for j in range(n) if j != i), default=each[0]) for i in range(n)]
        assert metrics.coqa_f1(text, answers) == pytest.approx(float(sum(others) / n), abs=1e-12)
        seen.add((any(same), 0 < max(each) < 1, metrics.coqa_f1(text, answers) < metrics.token_f1(text, answers)))
    assert len(seen) > 3  # every branch mattered


def test_a_mean_has_the_harness_error(harness: ModuleType) -> None:
    draw = random.Random(seeded())
    for values in ([float(draw.random() < 0.7) for _ in range(91)], [draw.gauss(-3, 2) for _ in range(50)]):
        expected = (statistics.fmean(values), harness.mean_stderr(values))
        assert metrics.mean_and_stderr(values) == pytest.approx(expected, rel=1e-12)
    assert metrics.mean_and_stderr([0.25])[0] == 0.25 and math.isnan(metrics.mean_and_stderr([0.25])[1])


def test_a_perplexity_has_the_bootstrap_error(harness: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """2,000 draws have an error of 1.6 % of their own: five times that, and a little for the curve of exp."""
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    draw = random.Random(seeded())
    log_probs = [draw.gauss(-3, 1) for _ in range(400)]
    value, stderr = metrics.perplexity_and_stderr(log_probs, [1] * 400)
    assert value == pytest.approx(harness.perplexity(log_probs), rel=1e-12)
    assert stderr == pytest.approx(harness.bootstrap_stderr(harness.perplexity, log_probs, iters=2000), rel=0.085)


def test_a_perplexity_by_units_has_the_jackknife_error() -> None:
    draw = random.Random(seeded())
    units = [draw.randint(5, 40) for _ in range(300)]
    log_probs = [draw.gauss(-3, 0.5) * n for n in units]

    def perplexity(skip: int | None) -> float:
        kept = [i for i in range(300) if i != skip]
        return math.exp(-sum(log_probs[i] for i in kept) / sum(units[i] for i in kept))

    without = [perplexity(i) for i in range(300)]
    jackknife = math.sqrt(299 * statistics.pvariance(without))
    value, stderr = metrics.perplexity_and_stderr(log_probs, units)
    assert value == pytest.approx(perplexity(None), rel=1e-12) and stderr == pytest.approx(jackknife, rel=0.02)
    assert metrics.perplexity_and_stderr([-1e6, -1e6], [1, 1])[0] == math.inf


def labels(draw: random.Random, n: int, among: int) -> tuple[list[int], list[int]]:
    correct = [draw.randrange(among) for _ in range(n)]
    return correct, [c if draw.random() < 0.5 else draw.randrange(among) for c in correct]


def class_f1(correct: Sequence[int], chosen: Sequence[int], label: int) -> float:
    both = sum(a == b == label for a, b in zip(correct, chosen, strict=True))
    return 2 * both / (list(correct).count(label) + list(chosen).count(label))


def test_matthews_and_f1_of_labels_are_the_usual_ones(harness: ModuleType) -> None:
    draw = random.Random(seeded())
    correct, chosen = labels(draw, 200, 2)
    pairs = list(zip(correct, chosen, strict=True))
    tp, tn, fp, fn = (pairs.count(x) for x in ((1, 1), (0, 0), (0, 1), (1, 0)))
    by_hand = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert metrics.matthews(correct, chosen) == pytest.approx(by_hand, abs=1e-12)
    assert metrics.matthews(correct, chosen) == pytest.approx(harness.matthews_corrcoef(pairs), abs=1e-12)
    assert metrics.label_f1(correct, chosen) == pytest.approx(class_f1(correct, chosen, 1), abs=1e-12)
    assert metrics.label_f1(correct, chosen) == pytest.approx(harness.f1_score(pairs), abs=1e-12)
    correct, chosen = labels(draw, 200, 3)
    expected = statistics.fmean(class_f1(correct, chosen, label) for label in range(3))
    assert metrics.label_f1(correct, chosen, "macro") == pytest.approx(expected, abs=1e-12)


def test_bleu_is_the_harness_with_its_signature(harness: ModuleType) -> None:
    draw = random.Random(seeded())
    answers = [texts(draw, 2, least=4) for _ in range(40)]
    made = [some[0] if draw.random() < 0.5 else texts(draw, 1, least=4)[0] for some in answers]
    score, signature = metrics.bleu(made, answers)
    assert 5 < score < 95 and score == pytest.approx(harness.bleu(list(zip(answers, made, strict=True))), abs=1e-9)
    assert signature.startswith("nrefs:2|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    uneven = [some if i else some[:1] for i, some in enumerate(answers)]
    assert metrics.bleu(made, uneven)[1].startswith("nrefs:var|")


def test_rouge_is_the_harness_and_the_mean_of_three(harness: ModuleType) -> None:
    from lm_eval.tasks.cnn_dailymail.utils import calculate_rouge_scores

    draw = random.Random(seeded())
    answers, made = texts(draw, 30, least=2), texts(draw, 30, least=2)
    figures, theirs = metrics.rouge(made, answers), calculate_rouge_scores(made, answers)
    assert {name: figures[name] for name in theirs} == pytest.approx(theirs, abs=1e-12)
    assert figures["rouge"] == pytest.approx(statistics.fmean(theirs.values()), abs=1e-12)
    first = metrics.rouge(["The runner is running home"], ["the runners run"])
    assert first["rouge1"] == pytest.approx(3 / 4)  # stemmed: the runner run, of 5 and 3 words
    assert first["rouge2"] == pytest.approx(1 / 3) and 0 < figures["rouge_stderr"] < 0.1


def test_summaries_end_after_their_third_sentence() -> None:
    text = ' It rose 3.5 % in May. "Why?" he asked. Nobody knew!\nThe end. '
    assert metrics.first_sentences(text, 3) == 'It rose 3.5 % in May. "Why?" he asked.'
    assert metrics.first_sentences(text, 1) == "It rose 3.5 % in May."
    assert metrics.first_sentences(text, 9) == text.strip()
    assert metrics.first_sentences("a title\n\none. two.\nthree.", 3) == "a title\n\none. two."
    assert metrics.first_sentences("", 3) == ""


def test_a_metric_without_its_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(metrics.LIBRARIES, "bleu", "no_such_library")
    with pytest.raises(UserError, match=r"bleu needs no_such_library, .* pip install 'gradus\[eval\]'"):
        metrics.check_installed("bleu")
    metrics.check_installed("exact_match")
