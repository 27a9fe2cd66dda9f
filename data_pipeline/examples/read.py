"""Files to examples in memory: what a record means, rendered; what gives none is dropped and counted by its reason."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from conf.errors import UserError
from data_pipeline.corpus.document import Dropped
from data_pipeline.examples.examples_config import ExamplesConfig, Form, Template
from data_pipeline.examples.forms import ASSISTANT, Comparison, Conversation, Misfit, form_of, meaning
from data_pipeline.examples.records import Record, records
from data_pipeline.examples.templates import Example, Piece, Renderer
from data_pipeline.tokenizer.tokenizer import Tokenizer

MAX_TOKENS = 1 << 31  # of all examples, which are held in memory
COMPARISONS = (Form.pair, Form.ranks)
_AT_ONCE = 256  # records in one call of the tokenizer


class Preference(NamedTuple):
    """Answers to one prompt, some above others; a sequence of a model is `prompt` and one of `answers`."""

    prompt: np.ndarray  # [p] int32, to the mark that opens an answer
    answers: tuple[np.ndarray, ...]  # K times [n] int32, each with its end token
    ranks: np.ndarray  # [K] int32: 0 is the best, equal ones are ties; of a pair 0 (chosen), 1 (rejected)


T = TypeVar("T", Example, Preference, np.ndarray)
Meant = Conversation | Comparison


@dataclass
class Tally:
    """The records that were read, and for each reason how many gave no example, with the place of the first."""

    records: int = 0
    dropped: dict[str, tuple[int, str]] = field(default_factory=dict)

    def kept(self, items: Iterable[Record | Dropped]) -> Iterator[Record]:
        """Count what a reader gives, and pass on its records."""
        for item in items:
            self.records += 1
            if isinstance(item, Dropped):
                self.drop(item.reason, item.path)
            else:
                yield item

    def drop(self, reason: str, path: str) -> None:
        count, first = self.dropped.get(reason, (0, path))
        self.dropped[reason] = count + 1, first

    def __str__(self) -> str:
        by_count = sorted(self.dropped.items(), key=lambda item: -item[1][0])
        return "; ".join(f"{count:,} dropped: {reason} (first: {path})" for reason, (count, path) in by_count)


@dataclass
class Examples(Generic[T]):
    """Everything that the files of a config give, in their order.

    paths: the record of each item. tokens: of all items. labels: those of them that are learnt.
    """

    items: list[T]
    paths: list[str]
    renderer: Renderer
    form: Form
    tally: Tally
    tokens: int = 0
    labels: int = 0
    longest: int = 0
    unknown: int = 0  # tokens that stand for text which the vocabulary cannot write

    def summary(self) -> list[str]:
        """Lines on the examples for the start of a run."""
        lines = [
            f"examples: {len(self.items):,} of {self.tally.records:,} records (form {self.form.value}, template "
            f"{self.renderer.template.value}): {self.tokens:,} tokens, {self.labels:,} of them labels; the longest has "
            f"{self.longest:,}"
        ]
        lines += [f"examples: {self.tally}"] if self.tally.dropped else []
        lines += [f"examples: {self.unknown:,} tokens are unknown to the vocabulary"] if self.unknown else []
        return lines


def read_examples(cfg: ExamplesConfig, tokenizer: Tokenizer, n_ctx: int) -> Examples[Example]:
    """Conversations and completions, for supervised fine-tuning; one of more than n_ctx + 1 ids is dropped.

    Its last id is a label and no input, as the last token of a window is.

    Raises:
        UserError: files that cannot be read, of no known form or with comparisons, or that hold no example.
    """

    def make(renderer: Renderer, meant: Conversation) -> list[list[Piece]]:
        return [renderer.conversation(meant)]

    return _read(cfg, tokenizer, n_ctx + 1, make, lambda parts, _: parts[0], comparisons=False)


def read_preferences(cfg: ExamplesConfig, tokenizer: Tokenizer, n_ctx: int) -> Examples[Preference]:
    """Comparisons, for a reward model or DPO; one is dropped if its prompt and an answer have more than n_ctx ids.

    Raises:
        UserError: files that cannot be read, of no known form or without comparisons, or that hold no example.
    """

    def make(renderer: Renderer, meant: Comparison) -> list[list[Piece]]:
        return [renderer.prompt(meant.prompt), *(renderer.answer(text) for text in meant.answers)]

    def join(parts: list[Example], meant: Comparison) -> Preference:
        prompt, *answers = (part.ids for part in parts)
        return Preference(prompt, tuple(answers), np.array(meant.ranks, np.int32))

    return _read(cfg, tokenizer, n_ctx, make, join, comparisons=True)


def read_prompts(cfg: ExamplesConfig, tokenizer: Tokenizer, n_ctx: int) -> Examples[np.ndarray]:
    """The ids [n] int32 of prompts, to the mark that opens an answer, of records of any form, for roll-outs.

    The prompt of a conversation is what comes before its last answer; it is dropped if n_ctx leaves no room for one.
    """

    def make(renderer: Renderer, meant: Meant) -> list[list[Piece]]:
        if isinstance(meant, Comparison):
            return [renderer.prompt(meant.prompt)]
        return [renderer.prompt(meant[:-1] if meant and meant[-1].role == ASSISTANT else meant)]

    return _read(cfg, tokenizer, n_ctx - 1, make, lambda parts, _: parts[0].ids, comparisons=None)


def _read(
    cfg: ExamplesConfig,
    tokenizer: Tokenizer,
    limit: int,
    make: Callable[[Renderer, Any], list[list[Piece]]],
    join: Callable[[list[Example], Any], T],
    *,
    comparisons: bool | None,
) -> Examples[T]:
    """The items of a config.

    Args:
        limit: ids of the longest sequence: the first that `make` gives, and one of those after it.
        make: the sequences of a record's meaning; join: the item of these, encoded.
        comparisons: the records are to be some, or are not to be, or either (None).
    """
    tally = Tally()
    source = tally.kept(records(cfg.path, cfg.columns))
    first, form = _begin(cfg, source, tally)
    if comparisons is not None and comparisons != (form in COMPARISONS):
        wanted = "comparisons (chosen and rejected, or responses with ranks)" if comparisons else "conversations"
        raise UserError(f"path={cfg.path}: the form {form.value} holds no {wanted}: give a file of some, or form=")
    template = cfg.template or (Template.text if form is Form.completion else Template.roles)
    found = Examples[T]([], [], Renderer(template, tokenizer), form, tally)
    everything = chain([first], source)
    while some := list(islice(everything, _AT_ONCE)):
        _add(found, list(_meanings(some, cfg, found, make)), limit, join)
        if found.tokens > MAX_TOKENS:
            raise UserError(
                f"path={cfg.path}: more than {MAX_TOKENS:,} tokens of examples, which are held in memory: give fewer, "
                "or make shards of them and pre-train"
            )
    if not found.items:
        raise UserError(f"path={cfg.path}: no example in {tally.records:,} records of the form {form.value}: {tally}")
    return found


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


def _meanings(
    some: Sequence[Record], cfg: ExamplesConfig, found: Examples[T], make: Callable[[Renderer, Any], list[list[Piece]]]
) -> Iterator[tuple[str, Meant, list[list[Piece]]]]:
    """(path, meaning, sequences) of records; drops those without."""
    for record in some:
        try:
            for meant in meaning(found.form, _named(record, cfg)):
                yield record.path, meant, make(found.renderer, meant)
        except Misfit as e:
            found.tally.drop(str(e), record.path)


def _add(
    found: Examples[T],
    rendered: Sequence[tuple[str, Meant, list[list[Piece]]]],
    limit: int,
    join: Callable[[list[Example], Any], T],
) -> None:
    encoded = iter(found.renderer.encode([pieces for *_, sequences in rendered for pieces in sequences]))
    unknown = found.renderer.tokenizer.unk_id
    for path, meant, sequences in rendered:
        parts = list(islice(encoded, len(sequences)))
        longest = len(parts[0].ids) + max((len(part.ids) for part in parts[1:]), default=0)
        if longest > limit:
            found.tally.drop(f"longer than {limit:,} tokens", path)
            continue
        found.items.append(join(parts, meant))
        found.paths.append(path)
        found.tokens += sum(len(part.ids) for part in parts)
        found.labels += sum(int(part.mask.sum()) for part in parts)
        found.longest = max(found.longest, longest)
        if unknown is not None:
            found.unknown += sum(int((part.ids == unknown).sum()) for part in parts)
