"""The description of an evaluation task, as conf/task/*.yaml gives it. Standard library only.

Texts are made from a document by templates, `{{ field }}` with Jinja's expressions; `correct`, `options_from` and
`answers` are such expressions without the braces.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated

from conf.errors import UserError

KINDS = ("choices", "completion", "perplexity", "generation")
Format = Annotated[str, re.compile("lines|jsonl|json|tsv|text|squad|coqa|multirc|record|winograd"), "a form of file"]
METRICS = ("exact_match", "exact_text", "f1", "coqa_f1", "bleu", "rouge")
LABEL_METRICS = ("f1", "macro_f1", "matthews")
Metric = Annotated[str, re.compile("|".join(METRICS)), f"one of {', '.join(METRICS)}"]
LabelMetric = Annotated[str, re.compile("|".join(LABEL_METRICS)), f"one of {', '.join(LABEL_METRICS)}"]
Scored = Annotated[str, re.compile("continuation|from_difference|shared_end"), "a rule of what is scored"]
Unit = Annotated[str, re.compile("words|tokens|bytes|characters"), "words, tokens, bytes or characters"]
CentredFigure = Annotated[str, re.compile("acc|acc_per_token"), "acc or acc_per_token"]


@dataclass(frozen=True)
class Data:
    """Documents in files of one form, one file after the other."""

    files: dict[str, str | None]  # name below task_data -> sha256; null: not known, so not compared
    format: Format
    documents: int | None = None  # in all the files; null = not known
    source: str = ""  # an address where people get the files
    columns: tuple[str, ...] = ()  # of a tsv file without a line of names
    labels: dict[str, str | None] = field(default_factory=dict)  # files whose lines are the documents' field `label`

    def __post_init__(self) -> None:
        if not self.files:
            raise UserError("data.files is empty: give at least one")


@dataclass(frozen=True)
class Choices:
    """One of some options is right; the model's is the one of the highest probability."""

    correct: str  # the index of the right option, from 0, or a list of those of the right ones
    options: tuple[str, ...] = ()  # templates
    options_from: str | None = None  # or an expression that gives a list of texts
    context: str = ""  # may name `option`
    continuation: str = " {{ option }}"
    unconditional: str | None = None  # the context of `acc_unconditional`, such as "Answer:"; null = no such figure
    labels: LabelMetric | None = None  # also this figure of the indices that are right and chosen
    ties: float = 0.0  # what an equally likely wrong option leaves of a right answer: 0, or 1/2 as BLiMP counts
    texts: bool = False  # also exact_match and f1 of the chosen option's text with those of the right ones
    group_by: str | None = None  # an expression, equal for the documents of which acc_group wants all to be right
    scored: Scored = "continuation"  # or, as nanochat: the tokens from where options differ, or the end that all share

    def __post_init__(self) -> None:
        if bool(self.options) == (self.options_from is not None):
            raise UserError("choices: give either options or options_from")
        if self.texts and self.labels == "f1":
            raise UserError("choices: texts: true and labels: f1 both name a figure f1: give one of them")


@dataclass(frozen=True)
class Completion:
    """One continuation is right: its probability, and whether the model would write it."""

    context: str
    continuation: str
    stop_words: bool = False  # also acc_no_stop_words: no word of a list of stop words may begin the continuation


@dataclass(frozen=True)
class Perplexity:
    """The text itself: its probability by a unit of the original text."""

    unit: Unit
    text: str = "{{ text }}"
    detokeniser: str | None = None  # a name of trainer/evaluation/kinds/detokenise.py; units are counted before it
    ends_of_lines: bool = False  # count an end of line as a word, as the sets of Mikolov and Merity do
    context: int = 1  # tokens before its first that a window of n_ctx sees at least, except in the first window


@dataclass(frozen=True)
class Generation:
    """The model writes; what it wrote is compared with answers."""

    context: str
    answers: str  # an expression: the list of right texts
    metric: Metric
    stop: tuple[str, ...] = ("\n",)
    max_new_tokens: int = 32
    beams: int = 1  # 1 = the likeliest token each time
    length_penalty: float = 0.6  # of beams
    top_k: int | None = None  # draw from so many instead
    sentences: int | None = None  # of the written text that count; null = all
    confidence: bool = False  # also the figure of the 1 % of texts that the model gives the highest probability
    answer: str = " {{ answers[0] }}"  # in a demonstration


@dataclass(frozen=True)
class Reference:
    """A figure that others have reported, 0.5 for 50 %."""

    model: str
    parameters: int
    metric: str
    value: float
    source: str
    shots: int = 0


@dataclass(frozen=True)
class Centred:
    """The figure `centred` = (figure - guessing) / (1 - guessing): 0 for who guesses, 1 for who knows all."""

    figure: CentredFigure
    guessing: float  # the figure of who guesses

    def __post_init__(self) -> None:
        if not 0 <= self.guessing < 1:
            raise UserError(f"guessing={self.guessing}: give a share from 0 to less than 1")


@dataclass(frozen=True)
class TaskConfig:
    """One task; of `choices`, `completion`, `perplexity` and `generation` it has exactly one."""

    about: str
    data: Data
    choices: Choices | None = None
    completion: Completion | None = None
    perplexity: Perplexity | None = None
    generation: Generation | None = None
    demonstrations: Data | None = None  # where shots come from; null = the other documents of `data`
    shots: int = 0
    separator: str = "\n\n"  # between demonstrations
    instruction: str = ""  # before the first one
    where: str | None = None  # an expression: take such documents alone
    start: bool = False  # the end-of-text token stands before every text, not before those without a context alone
    centred: Centred | None = None
    synthetic: bool = False  # made by a program: its n-grams of fewer than 8 words count too (GPT-3, appendix C)
    references: tuple[Reference, ...] = ()

    def __post_init__(self) -> None:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise UserError(f"give exactly one of {', '.join(KINDS)}; given: {', '.join(given) or 'none'}")
        if self.shots < 0:
            raise UserError(f"shots={self.shots}: give 0 or more")
        if self.centred is not None and not (self.choices or (self.completion and self.centred.figure == "acc")):
            raise UserError(f"centred.figure={self.centred.figure}: choices has acc and acc_per_token, completion acc")
        if self.perplexity is not None and self.shots:
            raise UserError(f"shots={self.shots}: perplexity takes no demonstrations: give shots=0")
