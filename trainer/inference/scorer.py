"""Scoring: the log-probability of each token of given texts, and whether it is the likeliest one.

Serves evaluation (log-likelihood of pairs, rolling perplexity), roll-outs (log-probabilities under a reference) and
chat. No logits of a whole batch are held, and no rank holds logits of the whole vocabulary.

Legend: B batch (rows), T time, N scored tokens of a batch, n of a chunk, C n_embd, V vocabulary on this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from conf.errors import UserError
from trainer.config.model import ModelConfig
from trainer.inference.lockstep import run_in_lockstep
from trainer.inference.sampler import BATCH, check_ids
from trainer.model.gpt import GPT

Pair = tuple[list[int], list[int]]  # context, continuation


@dataclass(frozen=True)
class Scores:
    """The tokens of one continuation, on the host."""

    log_p: Tensor  # [n] fp32, nats
    greedy: Tensor  # [n] bool: no token is likelier (of equals the first id counts)
    cut: int = 0  # tokens of the context that n_ctx leaves no room for: its first ones


OnBatch = Callable[[list[tuple[int, Scores]]], None]  # called with (index of the pair, its scores) of each batch
NO_SCORES = Scores(torch.empty(0), torch.empty(0, dtype=torch.bool))  # of a continuation without tokens


def score(
    model: GPT, pairs: Sequence[Pair], *, batch_size: int = BATCH, on_batch: OnBatch | None = None
) -> list[Scores]:
    """Scores of each (context, continuation); a pair's scores do not depend on the others.

    `on_batch` takes a batch's scores as soon as they are there, for a journal or a bar of progress: each pair is in one
    of its calls. An exception that it raises ends the scoring. Collective as `sampler.sample` is.

    Raises:
        UserError: an empty context, a continuation of more than n_ctx tokens, or an id outside of the vocabulary.
    """
    out = [NO_SCORES] * len(pairs)

    def forwards() -> Iterator[None]:
        jobs = [_job(i, context, continuation, model.cfg) for i, (context, continuation) in enumerate(pairs)]
        longest_first = sorted((job for job in jobs if job.n > 0), key=lambda job: -len(job.ids))
        if on_batch is not None and len(longest_first) < len(jobs):
            on_batch([(job.index, NO_SCORES) for job in jobs if job.n == 0])
        for start in range(0, len(longest_first), batch_size):
            batch = longest_first[start : start + batch_size]
            yield from _score(model, batch, out)
            if on_batch is not None:
                on_batch([(job.index, out[job.index]) for job in batch])

    run_in_lockstep(model, forwards())
    return out


def score_texts(model: GPT, texts: Sequence[list[int]], *, context: int = 1, batch_size: int = BATCH) -> list[Scores]:
    """Scores of all tokens of each text but the first, over `windows` of n_ctx tokens. Collective as `score` is."""
    parts = [windows(ids, model.cfg.n_ctx, context) for ids in texts]
    scores = iter(score(model, [pair for pairs in parts for pair in pairs], batch_size=batch_size))
    out = []
    for pairs in parts:
        own = [NO_SCORES, *(next(scores) for _ in pairs)]
        out.append(Scores(torch.cat([s.log_p for s in own]), torch.cat([s.greedy for s in own])))
    return out


def windows(ids: list[int], n_ctx: int, context: int = 1) -> list[Pair]:
    """Pairs whose continuations are, one after the other, all of `ids` but the first.

    The first id is context alone: put a prefix such as the end-of-text token before a text that is scored whole. Every
    window but the first sees at least `context` (1 to n_ctx) earlier tokens, and the last one as many as fit. With
    `context` 1 these are the windows of lm-evaluation-harness (`get_rolling_token_windows`).
    """
    if not 1 <= context <= n_ctx:
        raise UserError(f"windows with context={context}: give 1 to n_ctx={n_ctx}")
    pairs, done = [], 1
    while done < len(ids):
        end = min(done + (n_ctx if done == 1 else n_ctx - context + 1), len(ids))
        pairs.append((ids[max(0, end - n_ctx - 1) : done], ids[done:end]))
        done = end
    return pairs


@dataclass(frozen=True)
class _Job:
    index: int
    ids: list[int]
    n: int  # the last n ids are scored
    cut: int


def _job(index: int, context: list[int], continuation: list[int], cfg: ModelConfig) -> _Job:
    if not context or len(continuation) > cfg.n_ctx:
        raise UserError(
            f"pair {index} has a context of {len(context)} tokens and a continuation of {len(continuation)}: "
            f"give at least 1, and at most n_ctx={cfg.n_ctx}"
        )
    ids = context + continuation
    check_ids(f"pair {index}", ids, cfg.vocab_size)
    return _Job(index, ids[-(cfg.n_ctx + 1) :], len(continuation), max(0, len(ids) - cfg.n_ctx - 1))


def _score(model: GPT, jobs: list[_Job], out: list[Scores]) -> Iterator[None]:
    """Scores the jobs in one batch and puts the results into `out`; yields before its forward."""
    device = model.mesh.device
    width = len(jobs[0].ids) - 1  # the longest is first; the last id is a target only
    tokens_BT = torch.tensor([job.ids[:-1] + [0] * (width - len(job.ids) + 1) for job in jobs], device=device)
    labels_N = torch.tensor([token for job in jobs for token in job.ids[-job.n :]], device=device)
    row_N = torch.tensor([r for r, job in enumerate(jobs) for _ in range(job.n)], device=device)
    position_N = torch.cat([torch.arange(len(job.ids) - 1 - job.n, len(job.ids) - 1) for job in jobs]).to(device)
    yield
    x_NC = model.hidden(tokens_BT)[position_N, row_N]
    scores_N2 = model.wte(
        x_NC, head=True, reduce=lambda logits_nV, first: _log_p_and_greedy(model, logits_nV, labels_N[first:])
    )
    for job, scores_n2 in zip(jobs, scores_N2.cpu().split([job.n for job in jobs]), strict=True):
        out[job.index] = Scores(scores_n2[:, 0].float(), scores_n2[:, 1].bool(), job.cut)


def _log_p_and_greedy(model: GPT, logits_nV: Tensor, labels: Tensor) -> Tensor:
    """[n, 2] fp64: the log-probability of each of the first n labels, and 1 if it is the likeliest token. Collective
    over the tp ranks, each of which holds its part of the vocabulary."""
    mesh = model.mesh
    labels_n = labels[: len(logits_nV)]
    x_nV = logits_nV.float()
    top_n, id_n = x_nV.max(-1)
    shift_n = top_n.clamp(min=torch.finfo(x_nV.dtype).min)  # -inf on a rank that holds nothing but padding
    log_sum_n = (x_nV - shift_n[:, None]).exp_().sum(-1).log()
    first_id = mesh.tp_rank * x_nV.shape[-1]
    local_n = labels_n - first_id
    is_own_n = (local_n >= 0) & (local_n < x_nV.shape[-1])
    label_n = x_nV.gather(-1, local_n.where(is_own_n, 0)[:, None]).squeeze(-1).where(is_own_n, -torch.inf)
    stats_4n = torch.stack([x.double() for x in (top_n, log_sum_n, label_n, id_n + first_id)])
    parts = [torch.empty_like(stats_4n) for _ in range(mesh.tp)]
    if mesh.tp > 1:
        dist.all_gather(parts, stats_4n, group=mesh.tp_group)
    top_Rn, log_sum_Rn, label_Rn, id_Rn = torch.stack(parts if mesh.tp > 1 else [stats_4n], 1)
    best_n, rank_n = top_Rn.max(0)
    log_p_n = (label_Rn.amax(0) - best_n) - (log_sum_Rn + top_Rn - best_n).logsumexp(0)
    greedy_n = id_Rn.gather(0, rank_n[None])[0] == labels_n
    return torch.stack([log_p_n, greedy_n.double()], -1)
