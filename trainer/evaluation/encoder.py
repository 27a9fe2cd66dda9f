"""Token ids of texts as a model is asked about them."""

from __future__ import annotations

from conf.errors import UserError
from data_pipeline.tokenizer.tokenizer import Tokenizer
from trainer.inference.requests import Pair


class Encoder:
    """A tokenizer, and the token that a text from its start follows. Text never becomes a special token.

    `always`: that token stands before each context of a pair, not only in place of an empty one.
    """

    def __init__(self, tokenizer: Tokenizer, always: bool = False) -> None:
        self.tokenizer = tokenizer
        self.always = always
        self.start = [] if tokenizer.eot_id is None else [tokenizer.eot_id]  # GPT-1's vocabulary has none

    def pair(self, context: str, continuation: str) -> Pair:
        """The ids of both, cut where lm-evaluation-harness cuts: blanks at the end of the context belong to the
        continuation, and the ids are those of the whole text.

        An empty context is the end-of-text token. Where the vocabulary has none, the first token is the context, and
        not scored.

        Raises:
            UserError: a continuation without a token of its own.
        """
        kept = context.rstrip()
        whole = self.tokenizer.encode(context + continuation)
        before = len(self.tokenizer.encode(kept)) if kept else 0
        context_ids, ids = whole[:before], whole[before:]
        if self.always or not context_ids:
            context_ids = self.start + context_ids
        if not context_ids:
            context_ids, ids = ids[:1], ids[1:]
        if not ids or not context_ids:
            raise UserError(
                f"no token of {continuation!r} is left to score after {context[-40:]!r}: give a longer continuation"
            )
        return context_ids, ids

    def text(self, text: str) -> list[int]:
        """The ids of a text that is scored whole, after the start."""
        return self.start + self.tokenizer.encode(text)

    def prompt(self, text: str, room: int) -> list[int]:
        """The ids of a text to be continued: the last `room`, of an empty text the start."""
        ids = self.tokenizer.encode(text)[-room:] or self.start
        if not ids:
            raise UserError("an empty prompt, and the vocabulary has no end-of-text token: give one with a text")
        return ids
