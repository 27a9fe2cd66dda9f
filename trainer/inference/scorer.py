"""Scoring: the log-probability of each token of given texts, and whether it is the likeliest one.

Serves evaluation (log-likelihood of pairs, rolling perplexity), roll-outs (log-probabilities under a reference) and
chat. No logits of a whole batch are held, and no rank holds logits of the whole vocabulary.

Legend: B batch (rows), T time, N scored tokens, n places in rows that they come after (fewer where requests share
them), C n_embd, R tp ranks, V vocabulary on this rank.
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
from trainer.inference.packing import Request, Row, batches, rows
from trainer.inference.requests import Pair
from trainer.inference.sampler import BATCH, check_ids
from trainer.model.gpt import GPT


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

    A context that several pairs have, such as a question's choices, is computed once (`packing.rows`), so give one rank
    all of them. The order of `pairs` changes no bit, `batch_size` and tp what fp32 rounds. A forward takes at most
    `batch_size` x n_ctx tokens.
    `on_batch` takes a batch's scores as soon as they are there, for a journal or a bar of progress: each pair is in one
    of its calls. An exception that it raises ends the scoring. Collective as `sampler.sample` is.

    Raises:
        UserError: an empty context, a continuation of more than n_ctx tokens, or an id outside of the vocabulary.
    """
    out = [NO_SCORES] * len(pairs)

    def put(batch: list[tuple[int, Scores]]) -> None:
        for index, scores in batch:
            out[index] = scores
        if on_batch is not None and batch:
            on_batch(batch)

    def forwards() -> Iterator[None]:
        requests = [_request(i, context, continuation, model.cfg) for i, (context, continuation) in enumerate(pairs)]
        put([(r.index, NO_SCORES) for r in requests if not r.continuation])
        n_ctx = model.cfg.n_ctx
        packed = rows((r for r in requests if r.continuation), model.cfg.n_embd, widest=min(2, batch_size) * n_ctx)
        for batch in batches(packed, batch_size, n_ctx):
            yield
            put(_score(model, batch))

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


def _request(index: int, context: list[int], continuation: list[int], cfg: ModelConfig) -> Request:
    if not context or len(continuation) > cfg.n_ctx:
        raise UserError(
            f"pair {index} has a context of {len(context)} tokens and a continuation of {len(continuation)}: "
            f"give at least 1, and at most n_ctx={cfg.n_ctx}"
        )
    check_ids(f"pair {index}", context + continuation, cfg.vocab_size)
    cut = max(0, len(context) + len(continuation) - cfg.n_ctx - 1)
    return Request(index, context[cut:], continuation, cut)


def _score(model: GPT, batch: list[Row]) -> list[tuple[int, Scores]]:
    """The index and scores of each request, from one forward."""
    device = model.mesh.device
    tokens, segments, positions, columns = zip(*(row.lay_out() for row in batch), strict=True)
    segment_ids_BT = positions_BT = None
    if not all(row.is_plain for row in batch):
        segment_ids_BT, positions_BT = _padded(segments, -1).to(device), _padded(positions, 0).to(device)
    x_TBC = model.hidden(_padded(tokens, 0).to(device), None, segment_ids_BT, positions_BT)
    requests = [r for row in batch for r in row.requests]
    labels = torch.tensor([token for r in requests for token in r.continuation])
    places = torch.tensor([t * len(batch) + b for b, own in enumerate(columns) for ts in own for t in ts])
    place_n, row_N = places.unique(return_inverse=True)  # what requests share meets the head once
    row_N, order_N = row_N.sort(stable=True)
    label_N = labels[order_N].to(device)

    def reduce(logits_nV: Tensor, first: int) -> Tensor:
        chunk = slice(*torch.searchsorted(row_N, torch.tensor([first, first + len(logits_nV)])).tolist())
        return _log_p_and_greedy(model, logits_nV, (row_N[chunk] - first).to(device), label_N[chunk])

    scores_N2 = model.wte(x_TBC.flatten(0, 1)[place_n.to(device)], head=True, reduce=reduce).cpu()
    scores_N2 = scores_N2[order_N.argsort()]
    parts = scores_N2.split([len(r.continuation) for r in requests])
    return [(r.index, Scores(x[:, 0].float(), x[:, 1].bool(), r.cut)) for r, x in zip(requests, parts, strict=True)]


def _padded(rows: Sequence[list[int]], padding: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [padding] * (width - len(row)) for row in rows])


def _log_p_and_greedy(model: GPT, logits_nV: Tensor, row_N: Tensor, label_N: Tensor) -> Tensor:
    """[N, 2] fp64: the log-probability of each label after its row of logits, and 1 if it is the likeliest token.

    Collective over the tp ranks, each of which holds its part of the vocabulary.
    """
    mesh = model.mesh
    x_nV = logits_nV.float()
    top_n, id_n = x_nV.max(-1)
    shift_n = top_n.clamp(min=torch.finfo(x_nV.dtype).min)  # -inf on a rank that holds nothing but padding
    log_sum_n = (x_nV - shift_n[:, None]).exp_().sum(-1).log()
    first_id = mesh.tp_rank * x_nV.shape[-1]
    local_N = label_N - first_id
    is_own_N = (local_N >= 0) & (local_N < x_nV.shape[-1])
    label_logit_N = x_nV[row_N, local_N.where(is_own_N, 0)].where(is_own_N, -torch.inf)
    stats_4N = torch.stack(
        [x.double() for x in (top_n[row_N], log_sum_n[row_N], label_logit_N, id_n[row_N] + first_id)]
    )
    parts = [torch.empty_like(stats_4N) for _ in range(mesh.tp)]
    if mesh.tp > 1:
        dist.all_gather(parts, stats_4N, group=mesh.tp_group)
    top_RN, log_sum_RN, label_logit_RN, id_RN = torch.stack(parts if mesh.tp > 1 else [stats_4N], 1)
    best_N, rank_N = top_RN.max(0)
    log_p_N = (label_logit_RN.amax(0) - best_N) - (log_sum_RN + top_RN - best_N).logsumexp(0)
    greedy_N = id_RN.gather(0, rank_N[None])[0] == label_N
    return torch.stack([log_p_N, greedy_N.double()], -1)
