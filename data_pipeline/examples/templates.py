"""Templates: the turns of a conversation as token ids, with a mask of those that a model is to learn.

A template works on ids. The text of a turn is encoded as letters, whatever it spells, and never becomes a special
token; special tokens are put between the texts. An example begins with <|endoftext|>, as a document does in
pre-training, and each answer ends with a token that belongs to it: answer and end token are the labels.

    roles   <|endoftext|> <|user_start|>Hi<|user_end|> <|assistant_start|>Hello.<|assistant_end|>
    plain   <|endoftext|> \\n\\nHuman: Hi \\n\\nAssistant: Hello. <|endoftext|>
    text    <|endoftext|> Once upon a time, there was a king. <|endoftext|>
            <|endoftext|> <|fim_prefix|>Once upon a time<|fim_suffix|> a king.<|fim_middle|>, there was <|endoftext|>

A special token that the vocabulary lacks gets the next id behind it: the matrix of embeddings has rows there, for it is
padded to a multiple of 64 (47 more than GPT-2's vocabulary, 34 more than GPT-1's).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from conf.errors import UserError
from data_pipeline.examples.examples_config import Template
from data_pipeline.examples.forms import ASSISTANT, SUFFIX, SYSTEM, USER, Conversation, Misfit, Turn
from data_pipeline.tokenizer.tokenizer import Tokenizer
from data_pipeline.tokenizer.vocabularies import EOT, INFILL

Piece = tuple[str | list[int], bool]
"""A text or the ids of a marker, and True if these are labels."""


class Example(NamedTuple):
    """One sequence of a conversation or of a prompt and its completion."""

    ids: np.ndarray  # [n] int32
    mask: np.ndarray  # [n] bool: the ids that are labels; never the first


@dataclass(frozen=True)
class _Marks:
    """The special token, or the text, before and after a turn of each role.

    A space that ends the text before a turn is encoded with the turn: byte-level vocabularies have words with a space
    before them.
    """

    tokens: tuple[str, ...]  # those of the marks that are special tokens, in the order of their ids
    before: dict[str, str] = field(default_factory=dict)
    after: dict[str, str] = field(default_factory=dict)


_SIDES = {role: (f"<|{role}_start|>", f"<|{role}_end|>") for role in (SYSTEM, USER, ASSISTANT)}
_MARKS = {
    Template.roles: _Marks(
        (EOT, *(token for pair in _SIDES.values() for token in pair)),
        {role: start for role, (start, _) in _SIDES.items()},
        {role: end for role, (_, end) in _SIDES.items()},
    ),
    Template.plain: _Marks((EOT,), {USER: "\n\nHuman: ", ASSISTANT: "\n\nAssistant: "}, {ASSISTANT: EOT}),
    Template.text: _Marks((EOT,), {}, {ASSISTANT: EOT}),
}


def jinja(template: Template) -> str:
    """The template in the language of transformers' `chat_template`, for texts that spell no special token.

    A text that does becomes the token there, for transformers renders one text and encodes it; our `Renderer` does not.
    """
    marks = _MARKS[template]
    parts = [f"{{{{ {EOT!r} }}}}{{% for message in messages %}}"]
    for role in (SYSTEM, USER, ASSISTANT):
        before, after = marks.before.get(role, ""), marks.after.get(role, "")
        turn = f"{before!r} + message['content'] + {after!r}"
        parts.append(f"{{% if message['role'] == {role!r} %}}{{{{ {turn} }}}}{{% endif %}}")
    opening = marks.before.get(ASSISTANT, "").removesuffix(" ")
    return "".join([*parts, f"{{% endfor %}}{{% if add_generation_prompt %}}{{{{ {opening!r} }}}}{{% endif %}}"])


def end_token(template: Template) -> str:
    """The special token that ends an answer."""
    return _MARKS[template].after[ASSISTANT]


class Marked:
    """A tokenizer with special tokens that are put between texts; no text becomes one of them.

    special: the id of each: the vocabulary's own, or the next one behind it. vocab_size: all ids are below it; the
    model needs as many rows.

    Raises:
        UserError: the vocabulary makes one of the tokens from plain text.
    """

    def __init__(self, tokenizer: Tokenizer, tokens: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        new = iter(range(tokenizer.vocab_size, tokenizer.vocab_size + len(tokens)))
        known = tokenizer.special_ids
        self.special = {token: known[token] if token in known else next(new) for token in tokens}
        self.vocab_size = max(tokenizer.vocab_size, *(id_ + 1 for id_ in self.special.values()))
        made = {i for ids in tokenizer.encode_batch(list(self.special)) for i in ids.tolist()}
        if wrong := [token for token, id_ in self.special.items() if id_ in made]:
            raise UserError(f"{tokenizer.name}: this vocabulary makes {wrong[0]} from plain text: take another one")

    def encode(self, sequences: Sequence[Sequence[Piece]]) -> list[Example]:
        """The ids and masks of sequences of pieces."""
        texts = [part for pieces in sequences for part, _ in pieces if isinstance(part, str)]
        encoded = iter(self.tokenizer.encode_batch(texts) if texts else ())
        examples = []
        for pieces in sequences:
            parts = [np.asarray(next(encoded) if isinstance(part, str) else part, np.int32) for part, _ in pieces]
            mask = np.repeat([learnt for _, learnt in pieces], [len(part) for part in parts])
            examples.append(Example(np.concatenate(parts), mask))
        return examples


class Renderer(Marked):
    """Makes ids of conversations by one template and tokenizer; to be the same in training, evaluation and chat.

    end: the id that ends an answer. `more`: special tokens beside the template's.
    """

    def __init__(self, template: Template, tokenizer: Tokenizer, more: Sequence[str] = ()) -> None:
        marks = _MARKS[template]
        super().__init__(tokenizer, (*marks.tokens, *more))
        self.template = template
        self.end = self.special[marks.after[ASSISTANT]]
        self._space = {role for role, mark in marks.before.items() if mark.endswith(" ")}
        self._before = {role: self._ids(mark.removesuffix(" ")) for role, mark in marks.before.items()}
        self._after = {role: self._ids(mark) for role, mark in marks.after.items()}
        if INFILL[0] in more:
            self._before[SUFFIX], self._after[SUFFIX] = self._ids(INFILL[1]), self._ids(INFILL[2])

    def _ids(self, mark: str) -> list[int]:
        return [self.special[mark]] if mark in self.special else self.tokenizer.encode(mark)

    def conversation(self, turns: Conversation) -> list[Piece]:
        """The pieces of a whole conversation, each answer with its end as labels.

        Raises:
            Misfit: nothing in it is to be learnt, or it does not fit the template.
        """
        if not any(turn.role == ASSISTANT for turn in turns):
            raise Misfit("no answer")
        self._check(turns)
        return [self._start(turns), *(piece for turn in turns for piece in self._turn(turn))]

    def prompt(self, turns: Conversation) -> list[Piece]:
        """The pieces of what comes before an answer, its opening mark included; nothing in it is a label."""
        self._check((*turns, Turn(ASSISTANT, "answer")))
        asked = [piece for turn in turns for piece in self._turn(turn)]
        return [self._start(turns), *((part, False) for part, _ in asked), (self._before.get(ASSISTANT, []), False)]

    def answer(self, text: str) -> list[Piece]:
        """The pieces that continue `prompt` with an answer, all labels."""
        return [piece for piece in self._turn(Turn(ASSISTANT, text)) if piece[1]]

    def _start(self, turns: Conversation) -> Piece:
        inserts = any(turn.role == SUFFIX for turn in turns)
        return [self.special[EOT], *([self.special[INFILL[0]]] if inserts else [])], False

    def _turn(self, turn: Turn) -> list[Piece]:
        learnt = turn.role == ASSISTANT
        text = f" {turn.text}" if turn.role in self._space else turn.text
        return [(self._before.get(turn.role, []), False), (text, learnt), (self._after.get(turn.role, []), learnt)]

    def _check(self, turns: Conversation) -> None:
        if self.template is Template.text:
            if [turn.role for turn in turns if turn.role != SUFFIX] not in ([USER, ASSISTANT], [ASSISTANT]):
                raise Misfit("more than a prompt and its completion: take template=roles or plain")
            turns = turns[-1:]  # an empty prompt asks for any text
        elif any(turn.role == SUFFIX for turn in turns):
            raise Misfit("a text behind the answer: take template=text")
        if any(not turn.text.strip() for turn in turns):
            raise Misfit("an empty turn")
