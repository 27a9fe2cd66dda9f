"""The readers of examples: files in the forms that people have to conversations, comparisons and prompts as ids."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import numpy as np

from conf.errors import UserError
from data_pipeline.examples.collect import Examples, Join, Tally, collect
from data_pipeline.examples.examples_config import ExamplesConfig, Form, Template
from data_pipeline.examples.forms import ASSISTANT, Comparison, Conversation, form_of, meaning
from data_pipeline.examples.records import Record, records
from data_pipeline.examples.templates import Example, Piece, Renderer
from data_pipeline.tokenizer.tokenizer import Tokenizer
from data_pipeline.tokenizer.vocabularies import INFILL

COMPARISONS = (Form.pair, Form.ranks)
T = TypeVar("T")


class Prompt(NamedTuple):
    """The turns before an answer, as ids and as they were read."""

    ids: np.ndarray  # [n] int32, to the mark that opens an answer
    turns: Conversation


class Preference(NamedTuple):
    """Answers to one prompt, some above others; a sequence of a model is `prompt` and one of `answers`."""

    prompt: np.ndarray  # [p] int32, to the mark that opens an answer
    answers: tuple[np.ndarray, ...]  # K times [n] int32, each with its end token
    ranks: np.ndarray  # [K] int32: 0 is the best, equal ones are ties; of a pair 0 (chosen), 1 (rejected)


def read_examples(
    cfg: ExamplesConfig, tokenizer: Tokenizer, n_ctx: int, marks: Sequence[str] = ()
) -> Examples[Example, Renderer]:
    """Conversations and completions, for supervised fine-tuning; one of more than n_ctx + 1 ids is dropped.

    Its last id is a label and no input, as the last token of a window is. `marks`: special tokens that the renderer
    knows too, and for which each example leaves room.

    Raises:
        UserError: files that cannot be read, of no known form or with comparisons, or that hold no example.
    """

    def make(renderer: Renderer, meant: Conversation) -> list[list[Piece]]:
        return [renderer.conversation(meant)]

    limit = n_ctx + 1 - len(marks)
    return _read(
        cfg, tokenizer, limit, make, lambda parts, _: (parts[0], len(parts[0].ids)), comparisons=False, marks=marks
    )


def read_preferences(cfg: ExamplesConfig, tokenizer: Tokenizer, n_ctx: int) -> Examples[Preference, Renderer]:
    """Comparisons, for a reward model or DPO; one is dropped if its prompt and an answer have more than n_ctx ids.

    Raises:
        UserError: files that cannot be read, of no known form or without comparisons, or that hold no example.
    """

    def make(renderer: Renderer, meant: Comparison) -> list[list[Piece]]:
        return [renderer.prompt(meant.prompt), *(renderer.answer(text) for text in meant.answers)]

    def join(parts: list[Example], meant: Comparison) -> tuple[Preference, int]:
        prompt, *answers = (part.ids for part in parts)
        item = Preference(prompt, tuple(answers), np.array(meant.ranks, np.int32))
        return item, len(prompt) + max(map(len, answers))

    return _read(cfg, tokenizer, n_ctx, make, join, comparisons=True)


def read_prompts(cfg: ExamplesConfig, tokenizer: Tokenizer, n_ctx: int) -> Examples[Prompt, Renderer]:
    """The prompts of records of any form.

    The prompt of a conversation is what comes before its last answer; it is dropped if n_ctx leaves no room for one.
    """

    def asked(meant: Conversation | Comparison) -> Conversation:
        if isinstance(meant, Comparison):
            return meant.prompt
        return meant[:-1] if meant and meant[-1].role == ASSISTANT else meant

    def make(renderer: Renderer, meant: Conversation | Comparison) -> list[list[Piece]]:
        return [renderer.prompt(asked(meant))]

    def join(parts: list[Example], meant: Conversation | Comparison) -> tuple[Prompt, int]:
        return Prompt(parts[0].ids, asked(meant)), len(parts[0].ids)

    return _read(cfg, tokenizer, n_ctx - 1, make, join, comparisons=None)


def _read(
    cfg: ExamplesConfig,
    tokenizer: Tokenizer,
    limit: int,
    make: Callable[[Renderer, Any], list[list[Piece]]],
    join: Join[T],
    *,
    comparisons: bool | None,
    marks: Sequence[str] = (),
) -> Examples[T, Renderer]:
    """The items of a config.

    Args:
        limit, join: as `collect` takes them.
        make: the sequences of what a record means.
        comparisons: the records are to be some, or are not to be, or either (None).
        marks: special tokens beside the template's.
    """
    tally = Tally()
    source = tally.kept(records(cfg.path, cfg.columns))
    first, form = _begin(cfg, source, tally)
    if comparisons is not None and comparisons != (form in COMPARISONS):
        wanted = "comparisons (chosen and rejected, or responses with ranks)" if comparisons else "conversations"
        raise UserError(f"path={cfg.path}: the form {form.value} holds no {wanted}: give a file of some, or form=")
    template = cfg.template or (Template.text if form in (Form.completion, Form.insert) else Template.roles)
    renderer = Renderer(template, tokenizer, INFILL if form is Form.insert else marks)

    def meanings(record: Record) -> Iterator[tuple[Any, list[list[Piece]]]]:
        for meant in meaning(form, _named(record, cfg)):
            yield meant, make(renderer, meant)

    about = f"form {form.value}, template {template.value}"
    found = Examples[T, Renderer]([], [], renderer, about, tally)
    return collect(found, chain([first], source), limit, meanings, join, cfg.path)


def form_at(cfg: ExamplesConfig) -> Form:
    """The form of the files: as the config names it, or as the first record has it."""
    tally = Tally()
    return _begin(cfg, tally.kept(records(cfg.path, cfg.columns)), tally)[1]


def _begin(cfg: ExamplesConfig, source: Iterator[Record], tally: Tally) -> tuple[Record, Form]:
    """The first record, and the form of all."""
    first = next(source, None)
    if first is None:
        raise UserError(f"path={cfg.path}: no record there ({str(tally) or 'it is empty'}): give a file of some")
    return first, cfg.form or form_of(_named(first, cfg))


def _named(record: Record, cfg: ExamplesConfig) -> dict[str, Any]:
    """The fields of a record, also by the names that the form has for them."""
    theirs = {ours: record.fields[name] for ours, name in cfg.fields.items() if name in record.fields}
    return {**record.fields, **theirs}
