"""Labelled examples of GPT-1's fine-tuning: the inputs of its four kinds of tasks as ids (section 3.3 of the paper).

    classification   start text extract, or for two texts start a delimiter b extract
    similarity       both orders: start a delimiter b extract, start b delimiter a extract
    choice           for each answer: start document question delimiter answer extract

A head reads the hidden state of the last id, the extract token. The released code cuts what is too long; here it is
dropped and counted, as every example is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.examples.collect import Examples, Tally, collect
from data_pipeline.examples.examples_config import LabelledConfig, Task
from data_pipeline.examples.forms import Misfit, text_of
from data_pipeline.examples.records import Record, records
from data_pipeline.examples.templates import Example, Marked, Piece
from data_pipeline.tokenizer.tokenizer import Tokenizer

START, DELIMITER, EXTRACT = "<|start|>", "<|delimiter|>", "<|extract|>"


class Labelled(NamedTuple):
    """The inputs of one example: one, of a similarity two, of a choice one for each answer."""

    sequences: tuple[np.ndarray, ...]  # each [n] int32, from the start token to the extract token
    label: float  # the number of the class or of the right answer, or the similarity


class TaskRenderer(Marked):
    """Makes ids of the texts of a task; its three special tokens have the ids behind the vocabulary."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer, (START, DELIMITER, EXTRACT))

    def sequence(self, *texts: str) -> list[Piece]:
        """The pieces of texts with delimiters between them. All but the first id are labels of the language model."""
        pieces: list[Piece] = [([self.special[START]], False)]
        for k, text in enumerate(texts):
            pieces += [([self.special[DELIMITER]], True)] if k else []
            pieces.append((text, True))
        return [*pieces, ([self.special[EXTRACT]], True)]


def read_labelled(cfg: LabelledConfig, tokenizer: Tokenizer, n_ctx: int) -> Examples[Labelled, TaskRenderer]:
    """The labelled examples of files; one with an input of more than n_ctx ids is dropped, or without a label.

    Raises:
        UserError: files that cannot be read, or that hold no example.
    """
    renderer = TaskRenderer(tokenizer)

    def meanings(record: Record) -> Iterator[tuple[float, list[list[Piece]]]]:
        texts = [_filled(record.fields.get(name), name) for name in cfg.texts]
        answers = _answers(record.fields, cfg.choices)
        label = _label(record.fields.get(cfg.label), cfg, len(answers))
        inputs: Sequence[Sequence[str]] = [texts]
        if cfg.task is Task.similarity:
            inputs = [texts, texts[::-1]]
        elif cfg.task is Task.choice:
            inputs = [(" ".join(texts), answer) for answer in answers]
        yield label, [renderer.sequence(*parts) for parts in inputs]

    def join(parts: list[Example], label: float) -> tuple[Labelled, int]:
        sequences = tuple(part.ids for part in parts)
        return Labelled(sequences, label), max(map(len, sequences))

    tally = Tally()
    found = Examples[Labelled, TaskRenderer]([], [], renderer, f"task {cfg.task.value}", tally)
    return collect(found, tally.kept(records(cfg.path, cfg.columns)), n_ctx, meanings, join, cfg.path)


def _filled(value: Any, name: str) -> str:
    text = text_of(value, name)
    if not text.strip():
        raise Misfit("an empty text")
    return text


def _answers(fields: Mapping[str, Any], choices: Sequence[str]) -> list[str]:
    values = [fields.get(name) for name in choices]
    if len(values) == 1 and isinstance(values[0], list):
        values = values[0]
    answers = [_filled(value, "choices") for value in values]
    if choices and len(answers) < 2:
        raise Misfit("fewer than two answers to choose from")
    return answers


def _label(value: Any, cfg: LabelledConfig, answers: int) -> float:
    if value is None or value == "":
        raise Misfit("no label")
    if cfg.task is Task.similarity:
        try:
            score = float(value)
        except (TypeError, ValueError):
            raise Misfit("a label that is no number") from None
        if not math.isfinite(score):
            raise Misfit("a label that is no number")
        return score
    word = str(value).lower() if isinstance(value, bool) else str(value)
    classes = cfg.classes or [str(k) for k in range(answers)]
    if word not in classes or (cfg.task is Task.choice and classes.index(word) >= answers):
        raise Misfit("a label that is none of the classes or answers")
    return float(classes.index(word))
