"""Beam search: the likeliest continuations of prompts of any lengths, over one cache, on any layout of the model.

Legend: B batch (rows, one for each hypothesis that goes on), T time, V vocabulary, K candidates of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from conf.errors import UserError
from trainer.inference.cache import KVCache
from trainer.inference.lockstep import run_in_lockstep
from trainer.inference.sampler import BATCH, OnTexts, Stop, check_prompt, same_on_tp
from trainer.model.gpt import GPT


@dataclass(frozen=True)
class Hypothesis:
    """A continuation; `score`: `log_p`, its log-probability in nats, over the length penalty."""

    new: list[int]
    log_p: float = 0.0
    score: float = 0.0


@dataclass(frozen=True)
class Beam:
    """The rule of a search. Defaults: GPT-3's (arXiv 2005.14165, section 3.3)."""

    width: int = 4
    alpha: float = 0.6

    def __post_init__(self) -> None:
        if self.width < 1 or self.alpha < 0:
            raise UserError(
                f"a beam of width={self.width}, alpha={self.alpha}: give a width of at least 1, an alpha >= 0"
            )

    def score(self, log_p: float, n: int) -> float:
        """log p / ((5 + n) / 6)^alpha for n tokens (Wu et al. 2016, equation 14, without coverage)."""
        return log_p / ((5 + n) / 6) ** self.alpha


def beam_search(
    model: GPT,
    prompts: Sequence[list[int]],
    beam: Beam,
    *,
    max_new_tokens: int | Sequence[int],
    eot: int | None = None,
    stop: Stop | None = None,
    batch_size: int = BATCH,
    on_batch: OnTexts | None = None,
) -> list[Hypothesis]:
    """The continuation of each prompt with the best score that a search finds.

    A step takes the `width` likeliest continuations by one token of what the beam holds. Those that end, with `eot`,
    a true `stop(...)`, their `max_new_tokens` or the end of n_ctx, leave the beam, and the next likeliest ones that do
    not end take their places. A search ends when nothing in its beam can reach the best score found: an end any
    later would change nothing. `stop` says the same of the same tokens; of one prompt it is asked about several.
    `batch_size`: hypotheses at a time. `on_batch`: as that of `sampler.sample`; collective as that is.

    Raises:
        UserError: a prompt that is empty, longer than n_ctx, or holds an id outside of the vocabulary.
    """
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
    searches: list[_Search] = []

    def forwards() -> Iterator[None]:
        for i, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
            check_prompt(i, prompt, model.cfg)
            limit = min(limit, model.cfg.n_ctx - len(prompt))
            searches.append(_Search(i, prompt, limit, beam, eot, stop))
        longest_first = sorted((s for s in searches if s.limit > 0), key=lambda s: -len(s.prompt))
        at_once = max(1, batch_size // beam.width)
        if on_batch is not None and len(longest_first) < len(searches):
            on_batch([(s.index, []) for s in searches if s.limit == 0])
        for start in range(0, len(longest_first), at_once):
            batch = longest_first[start : start + at_once]
            yield from _search(model, batch)
            if on_batch is not None:
                on_batch([(s.index, s.best.new if s.best else []) for s in batch])

    run_in_lockstep(model, forwards())
    return [s.best or Hypothesis([]) for s in searches]


@dataclass
class _Search:
    """The search of one prompt."""

    index: int
    prompt: list[int]
    limit: int  # new tokens at most
    beam: Beam
    eot: int | None
    stop: Stop | None
    alive: list[Hypothesis] = field(default_factory=lambda: [Hypothesis([])])  # the likeliest first
    best: Hypothesis | None = None  # of those that have ended

    def advance(self, log_p_BK: Tensor, token_BK: Tensor) -> list[int]:
        """Goes on by one token; returns the row of `alive`, as it was, that each hypothesis of `alive` continues.

        `log_p_BK`: of the likeliest tokens after each hypothesis, fp64 on the host. Of equals the first is taken.
        """
        log_p_BK = log_p_BK + torch.tensor([h.log_p for h in self.alive], dtype=torch.float64)[:, None]
        K, width = log_p_BK.shape[1], self.beam.width
        order = log_p_BK.flatten().sort(descending=True, stable=True).indices[: 2 * width].tolist()
        before, self.alive, parents = self.alive, [], []
        for rank, i in enumerate(order):
            log_p, token = log_p_BK.flatten()[i].item(), int(token_BK.flatten()[i])
            new = [*before[i // K].new, token]
            h = Hypothesis(new, log_p, self.beam.score(log_p, len(new)))
            if not self._ends(token, new):
                self.alive.append(h)
                parents.append(i // K)
            elif rank < width and (self.best is None or h.score > self.best.score):
                self.best = h
            if len(self.alive) == width:
                break
        if self.best is not None and self.alive:
            attainable = self.beam.score(self.alive[0].log_p, self.limit)  # log p only falls, the penalty only grows
            if attainable <= self.best.score:
                self.alive, parents = [], []
        return parents

    def _ends(self, token: int, new: list[int]) -> bool:
        at_end = token == self.eot or len(new) == self.limit
        return at_end or (self.stop is not None and self.stop(self.index, new))


def _search(model: GPT, searches: list[_Search]) -> Iterator[None]:
    """Runs the searches in one batch; yields before each forward."""
    device = model.mesh.device
    cache = KVCache(min(model.cfg.n_ctx, max(len(s.prompt) + s.limit for s in searches)))
    width = max(len(s.prompt) for s in searches)
    tokens_BT = torch.tensor([s.prompt + [0] * (width - len(s.prompt)) for s in searches], device=device)
    last_B = torch.tensor([len(s.prompt) - 1 for s in searches], device=device)
    while searches:
        yield
        logits_BV = model.logits(tokens_BT, cache, index_B=last_B)[:, 0].float()
        cache.lengths = [len(s.prompt) + len(h.new) for s in searches for h in s.alive]
        top_BK, token_BK = logits_BV.topk(min(2 * searches[0].beam.width, logits_BV.shape[-1]))
        log_p_BK = top_BK.double() - logits_BV.double().logsumexp(-1, keepdim=True)
        both_2BK = same_on_tp(torch.stack([log_p_BK, token_BK.double()]), model.mesh).cpu()
        parents, first = [], 0
        for s, part_2BK in zip(searches, both_2BK.split([len(s.alive) for s in searches], dim=1), strict=True):
            parents += [first + row for row in s.advance(*part_2BK)]
            first += part_2BK.shape[1]
        cache.keep(parents)
        searches = [s for s in searches if s.alive]
        tokens_BT = torch.tensor([h.new[-1:] for s in searches for h in s.alive], device=device)
        last_B = torch.zeros(len(parents), dtype=torch.long, device=device)
