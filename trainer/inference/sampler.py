"""Sampling: continue prompts of any lengths in one batch over one cache, on any layout of the model.

Legend: B batch (rows), T time, V vocabulary, K candidates of top-k or top-p.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from conf.errors import UserError
from trainer.config.model import ModelConfig
from trainer.distributed.mesh import Mesh
from trainer.distributed.seeds import stable_seed
from trainer.inference.cache import KVCache
from trainer.inference.lockstep import run_in_lockstep
from trainer.inference.requests import Sampling
from trainer.model.gpt import GPT

BATCH = 16  # prompts at a time: keys and values of all their tokens are in memory
NUCLEUS = 64  # candidates that top-p looks at first; eight times as many where they do not hold enough probability

OnTexts = Callable[[list[tuple[int, list[int]]]], None]  # called with (index of the prompt, its new tokens) of a batch
Stop = Callable[[int, list[int]], bool]  # called after each new token with (index of the prompt, its new tokens)


def draw(sampling: Sampling, logits_BV: Tensor, u_B: Tensor) -> Tensor:
    """One id for each row [B]: the inverse of the cumulated probabilities at `u_B` (fp64, in [0, 1)).

    Probabilities are cumulated in the order of ids, with `top_k` or `top_p` from the likeliest down. A row's id does
    not depend on the other rows.
    """
    if sampling.banned:
        logits_BV = logits_BV.index_fill(-1, torch.tensor(sampling.banned, device=logits_BV.device), -torch.inf)
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    likeliest_B1 = logits_BV.amax(-1, keepdim=True).double()
    mass_BV = ((logits_BV - likeliest_B1) / sampling.temperature).exp_()  # e^0 = 1 for the likeliest: no overflow
    if sampling.top_k is None and sampling.top_p is None:
        return invert(mass_BV, u_B)
    if sampling.top_p is None:
        mass_BK, id_BK = mass_BV.topk(min(sampling.top_k or 0, mass_BV.shape[-1]))
        return id_BK.gather(-1, invert(mass_BK, u_B)[:, None]).squeeze(-1)
    return _draw_from_nucleus(mass_BV, u_B, sampling.top_p, sampling.top_k)


def _draw_from_nucleus(mass_BV: Tensor, u_B: Tensor, top_p: float, top_k: int | None) -> Tensor:
    """Draws from the fewest likeliest tokens whose share of all mass reaches `top_p`, and at most `top_k`.

    Sorts as many candidates as a row needs: rows that need more than K are tried again with 8 K.
    """
    limit_B = top_p * mass_BV.sum(-1)
    candidates = min(top_k or mass_BV.shape[-1], mass_BV.shape[-1])
    out_B = torch.empty_like(u_B, dtype=torch.long)
    rows, K = torch.arange(len(u_B), device=u_B.device), min(NUCLEUS, candidates)
    while len(rows):
        mass_BK, id_BK = mass_BV[rows].topk(K)
        sum_BK = mass_BK.cumsum(-1)
        enough = (sum_BK[:, -1] >= limit_B[rows]) | (candidates == K)
        kept_BK = mass_BK.where(sum_BK - mass_BK < limit_B[rows, None], 0.0)
        ids_B = id_BK.gather(-1, invert(kept_BK, u_B[rows])[:, None]).squeeze(-1)
        out_B[rows[enough]] = ids_B[enough]
        rows, K = rows[~enough], min(8 * K, candidates)
    return out_B


def invert(mass_BK: Tensor, u_B: Tensor) -> Tensor:
    """Index [B] of the token in whose share of the cumulated masses the point u x total lies; its mass is not 0."""
    sum_BK = mass_BK.cumsum(-1)
    total_B = sum_BK[:, -1]
    point_B = torch.minimum(u_B.double() * total_B, total_B.nextafter(torch.zeros_like(total_B)))
    return torch.searchsorted(sum_BK, point_B[:, None], right=True).squeeze(-1)


def sample(
    model: GPT,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    *,
    max_new_tokens: int | Sequence[int],
    seed: int = 0,
    keys: Sequence[int] | None = None,
    eot: int | None = None,
    stop: Stop | None = None,
    slide: int | None = None,
    batch_size: int = BATCH,
    on_batch: OnTexts | None = None,
) -> list[list[int]]:
    """The new tokens of each prompt: up to its `max_new_tokens`, an `eot`, a true `stop(...)`, or the end of n_ctx.

    With `slide` (1 to n_ctx) texts go on beyond n_ctx: `window_start` says which last tokens the model then sees. A
    position's embedding changes with the window, so each slide computes the whole window anew.
    A prompt's draws are a function of (seed, key, number of the new token): neither the batch nor the rank counts.
    `keys` are the prompts' indices by default; where ranks have parts of one list, give the indices in that list.
    `on_batch` takes the texts of a batch once all have ended: each prompt is in one of its calls.
    Collective where ranks share a model: tp ranks give the same prompts; under ZeRO-3 each rank gives its own, any
    number of them.

    Raises:
        UserError: a prompt that is empty, longer than n_ctx without `slide`, or holds an id outside of the vocabulary.
    """
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
    texts: list[_Text] = []

    def forwards() -> Iterator[None]:
        for i, (prompt, limit, key) in enumerate(zip(prompts, limits, keys or range(len(prompts)), strict=True)):
            texts.append(_text(i, prompt, limit, stable_seed("sample", seed, key), model.cfg, slide))
        longest_first = sorted((t for t in texts if t.limit > 0), key=lambda t: -len(t.prompt))
        if on_batch is not None and len(longest_first) < len(texts):
            on_batch([(t.index, t.new) for t in texts if t.limit == 0])
        for start in range(0, len(longest_first), batch_size):
            batch = whole = longest_first[start : start + batch_size]
            while batch:  # once more after each slide
                for text in batch:
                    text.open_window(model.cfg.n_ctx, slide)
                yield from _continue(model, batch, sampling, eot, stop)
                batch = [t for t in batch if not t.ended]
            if on_batch is not None:
                on_batch([(t.index, t.new) for t in whole])

    run_in_lockstep(model, forwards())
    return [t.new for t in texts]


def check_ids(name: str, ids: list[int], vocab_size: int) -> None:
    """UserError about the first of `ids` that the model's vocabulary lacks."""
    bad = next((t for t in ids if not 0 <= t < vocab_size), None)
    if bad is not None:
        raise UserError(f"{name} holds token id {bad}: the model's ids go from 0 to {vocab_size - 1}")


def check_prompt(index: int, prompt: list[int], cfg: ModelConfig, *, any_length: bool = False) -> None:
    """UserError about a prompt that is empty, longer than n_ctx without `any_length`, or no text of the vocabulary."""
    check_ids(f"prompt {index}", prompt, cfg.vocab_size)
    if not prompt or (not any_length and len(prompt) > cfg.n_ctx):
        raise UserError(f"prompt {index} has {len(prompt)} tokens: give 1 to n_ctx={cfg.n_ctx}")


def window_start(tokens: int, n_ctx: int, slide: int) -> int:
    """The first token that the one after `tokens` is drawn from: the fewest slides that leave at most n_ctx."""
    return -(-max(0, tokens - n_ctx) // slide) * slide


@dataclass
class _Text:
    index: int
    prompt: list[int]
    limit: int  # new tokens at most
    draws: (
        Tensor  # uniform numbers in [0, 1), fp64 [limit + 1], of which the i-th does not depend on how many there are
    )
    new: list[int] = field(default_factory=list)
    window: list[int] = field(default_factory=list)  # the tokens that the next one is drawn from
    ended: bool = False

    def open_window(self, n_ctx: int, slide: int | None) -> None:
        ids = self.prompt + self.new
        self.window = ids[window_start(len(ids), n_ctx, slide or n_ctx) :]


def _text(index: int, prompt: list[int], limit: int, seed: int, cfg: ModelConfig, slide: int | None) -> _Text:
    check_prompt(index, prompt, cfg, any_length=slide is not None)
    if slide is None:
        limit = min(limit, cfg.n_ctx - len(prompt))
    generator = torch.Generator().manual_seed(seed)
    return _Text(index, prompt, limit, torch.rand(limit + 1, generator=generator, dtype=torch.float64))


def _continue(model: GPT, texts: list[_Text], sampling: Sampling, eot: int | None, stop: Stop | None) -> Iterator[None]:
    """Continues the texts in one batch until each has ended or its window is full; yields before each forward."""
    device, n_ctx = model.mesh.device, model.cfg.n_ctx
    cache = KVCache(min(n_ctx, max(len(t.window) + t.limit - len(t.new) for t in texts)))
    width = max(len(t.window) for t in texts)
    tokens_BT = torch.tensor([t.window + [0] * (width - len(t.window)) for t in texts], device=device)
    last_B = torch.tensor([len(t.window) - 1 for t in texts], device=device)
    while texts:
        yield
        logits_BV = model.logits(tokens_BT, cache, index_B=last_B)[:, 0]
        # a row that has ended, or waits for a slide, stays where it is
        cache.lengths = [min(len(t.window) - t.ended, n_ctx - 1) for t in texts]
        u_B = torch.stack([t.draws[len(t.new)] for t in texts]).to(device)
        for t, token in zip(texts, same_on_tp(draw(sampling, logits_BV, u_B), model.mesh).tolist(), strict=True):
            if not t.ended and len(t.window) <= n_ctx:
                t.new.append(token)
                t.window.append(token)
                stopped = stop is not None and stop(t.index, t.new)
                t.ended = stopped or token == eot or len(t.new) == t.limit
        alive = [i for i, t in enumerate(texts) if not t.ended and len(t.window) <= n_ctx]
        if 2 * len(alive) <= len(texts):
            texts = [texts[i] for i in alive]
            cache.keep(alive)
        tokens_BT = torch.tensor([t.window[-1:] for t in texts], device=device)
        last_B = torch.zeros(len(texts), dtype=torch.long, device=device)


def same_on_tp(x: Tensor, mesh: Mesh) -> Tensor:
    """The result of tp rank 0: sums on a GPU may round differently on each, and texts must not part."""
    if mesh.tp > 1:
        dist.broadcast(x, mesh.world.rank - mesh.tp_rank, group=mesh.tp_group)
    return x
