"""Figures of a task: texts compared with right answers, means with their standard errors, and libraries' metrics.

Figures are fractions, 0.5 for 50 %; BLEU alone goes from 0 to 100. A standard error of a single value is nan.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import zip_longest

from conf.errors import UserError
from data_pipeline.tokenizer.tokenizer import Tokenizer

LIBRARIES = {"bleu": "sacrebleu", "rouge": "rouge_score", "matthews": "sklearn", "label_f1": "sklearn"}
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
SENTENCE_END = re.compile(r"[.!?]+[\"'”’)\]]*(?:\s+|\Z)|\n")


def check_installed(metric: str) -> None:
    """Check that the library of a metric is there, if it has one.

    Raises:
        UserError: it is not; names the extra that has it.
    """
    library = LIBRARIES.get(metric)
    if library is not None and find_spec(library) is None:
        raise UserError(f"the metric {metric} needs {library}, which is not installed: pip install 'gradus[eval]'")


def normalised(answer: str) -> str:
    """Lower case, no punctuation, no articles, single blanks: as the scripts of SQuAD and Natural Questions do."""
    words = re.sub(r"\b(a|an|the)\b", " ", answer.lower().translate(NO_PUNCTUATION))
    return " ".join(words.split())


def exact_match(text: str, answers: Sequence[str]) -> float:
    """1.0 if the normalised text is one of the normalised answers, else 0.0."""
    return float(normalised(text) in map(normalised, answers))


def token_f1(text: str, answers: Sequence[str]) -> float:
    """F1 of the normalised words, each as often as it occurs, with the answer that fits best."""
    return max(_f1(normalised(text).split(), normalised(answer).split()) for answer in answers)


def coqa_f1(text: str, answers: Sequence[str]) -> float:
    """The mean of `token_f1` with each person's answer left out in turn: so CoQA measures people, too."""
    if len(answers) == 1:
        return token_f1(text, answers)
    return sum(token_f1(text, [*answers[:i], *answers[i + 1 :]]) for i in range(len(answers))) / len(answers)


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error, the sample standard deviation / sqrt(n); of an accuracy too."""
    return _ratio_and_stderr(values, [1.0] * len(values))


def perplexity_and_stderr(log_probs: Sequence[float], units: Sequence[float]) -> tuple[float, float]:
    """exp(-sum of log-probabilities / sum of units) over documents, and its standard error; inf where it is too large.

    The error is that of the exponent, times the perplexity (the delta method): nothing is drawn, as in a bootstrap.
    """
    mean, stderr = _ratio_and_stderr(log_probs, units)
    value = math.exp(-mean) if -mean < 700 else math.inf
    return value, value * stderr


def matthews(correct: Sequence[int], chosen: Sequence[int]) -> float:
    """Matthews' correlation of two lists of labels, from -1 to 1: CoLA's figure."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(correct, chosen))


def label_f1(correct: Sequence[int], chosen: Sequence[int], average: str = "binary") -> float:
    """F1 of label 1, or with average="macro" the mean of the labels' F1, which CommitmentBank reports."""
    from sklearn.metrics import f1_score

    return float(f1_score(correct, chosen, average=average))


def stop_tokens(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids of tokens that are a blank and a word, in any case, of scikit-learn's list of English stop words."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    texts = (tokenizer.decode([i]) for i in range(tokenizer.vocab_size))
    return tuple(i for i, text in enumerate(texts) if text[:1] == " " and text[1:].lower() in ENGLISH_STOP_WORDS)


def bleu(texts: Sequence[str], answers: Sequence[Sequence[str]]) -> tuple[float, str]:
    """BLEU of all texts together, 0 to 100, and sacrebleu's signature, without which it compares with nothing."""
    from sacrebleu.metrics import BLEU

    metric = BLEU()
    score = metric.corpus_score(list(texts), [list(one_of_each) for one_of_each in zip_longest(*answers)])
    return float(score.score), str(metric.get_signature())


def rouge(texts: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    """F1 of stemmed ROUGE-1, 2 and L, and `rouge`, the mean of the three: each as a mean over texts with its stderr."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    scores = [scorer.score(answer, text) for text, answer in zip(texts, answers, strict=True)]
    values = {name: [float(score[name].fmeasure) for score in scores] for name in ("rouge1", "rouge2", "rougeL")}
    values["rouge"] = [sum(three) / 3 for three in zip(*values.values(), strict=True)]
    figures = {name: mean_and_stderr(some) for name, some in values.items()}
    return {name: mean for name, (mean, _) in figures.items()} | {f"{n}_stderr": e for n, (_, e) in figures.items()}


def first_sentences(text: str, n: int) -> str:
    """The first `n` sentences. One ends with its line, or at . ! or ? before a blank, closing marks in between."""
    text, ends = text.strip(), [0]
    for found in SENTENCE_END.finditer(text):
        if text[ends[-1] : found.end()].strip():
            ends.append(found.end())
        if len(ends) > n:
            return text[: ends[-1]].rstrip()
    return text


def _ratio_and_stderr(values: Sequence[float], units: Sequence[float]) -> tuple[float, float]:
    """sum(values) / sum(units) over independent documents, and its standard error, linearised around the ratio."""
    n, total = len(values), math.fsum(units)
    ratio = math.fsum(values) / total
    squares = math.fsum((value - ratio * unit) ** 2 for value, unit in zip(values, units, strict=True))
    return ratio, math.sqrt(squares * n / (n - 1)) / total if n > 1 else math.nan


def _f1(words: list[str], answer: list[str]) -> float:
    if not words or not answer:
        return float(words == answer)
    return 2 * (Counter(words) & Counter(answer)).total() / (len(words) + len(answer))
