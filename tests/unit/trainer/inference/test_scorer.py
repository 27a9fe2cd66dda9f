"""Scores against transformers and against one pair at a time; windows against lm-evaluation-harness' definition."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from conf.errors import UserError
from tests.helpers.gpt_twins import CFG, log_p, ours, random_texts, theirs
from tests.helpers.operations import Operations
from tests.helpers.seeds import seeded
from trainer.config.model import ModelConfig, Norm
from trainer.distributed.mesh import Mesh
from trainer.inference.requests import Pair, Sampling
from trainer.inference.sampler import sample
from trainer.inference.scorer import Scores, score, score_texts, windows
from trainer.model import plain_linear
from trainer.model.gpt import GPT
from trainer.model.init import initialise

SPLITS = [(1, 5), (30, 1), (64, 1), (1, 64), (12, 20), (2, 2), (40, 24), (7, 0)]  # context, continuation; n_ctx is 64


def pairs_of(cfg: ModelConfig, seed: int) -> list[Pair]:
    texts = random_texts([a + b for a, b in SPLITS], cfg.vocab_size, seed)
    return [(ids[:a], ids[a:]) for ids, (a, _) in zip(texts, SPLITS, strict=True)]


@pytest.mark.parametrize("norm", Norm, ids=lambda n: n.value)
def test_scores_equal_transformers_log_probabilities(norm: Norm, mesh: Mesh) -> None:
    cfg, seed = replace(CFG, norm=norm), seeded()
    hf, pairs = theirs(cfg, seed), pairs_of(cfg, seed)
    best = sample(ours(cfg, seed, mesh), [[3, 4]], Sampling(0.0), max_new_tokens=9)[0]
    pairs.append(([3, 4], best))
    scores = score(ours(cfg, seed, mesh), pairs)
    for (context, continuation), got in zip(pairs, scores, strict=True):
        if continuation:
            expected, greedy = log_p(hf, context, continuation)
            assert (got.log_p - expected).abs().max() <= 1e-5, f"{seed=}"
            assert torch.equal(got.greedy, greedy)
        assert (len(got.log_p), got.cut) == (len(continuation), 0)
    assert scores[-1].greedy.all()


def test_a_context_that_does_not_fit_loses_its_first_tokens(mesh: Mesh) -> None:
    """The result says so."""
    seed = seeded()
    (ids,) = random_texts([90], CFG.vocab_size, seed)
    (got,) = score(ours(CFG, seed, mesh), [(ids[:70], ids[70:])])
    expected, _ = log_p(theirs(CFG, seed), ids[25:70], ids[70:])
    assert got.cut == 25 and (got.log_p - expected).abs().max() <= 1e-5


def test_a_pairs_scores_do_not_depend_on_the_batch_or_the_chunk(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = seeded()
    model, pairs = ours(CFG, seed, mesh), pairs_of(CFG, seed)
    whole = score(model, pairs)
    for chunk_bytes, batch_size in ((1 << 26, 1), (1, 3), (7 * 4 * 512, 16)):
        monkeypatch.setattr(plain_linear, "LOSS_CHUNK_BYTES", chunk_bytes)
        for a, b in zip(score(model, pairs, batch_size=batch_size), whole, strict=True):
            assert torch.equal(a.greedy, b.greedy)
            assert (a.log_p - b.log_p).abs().max() <= 1e-5 if len(a.log_p) else len(b.log_p) == 0


SMALL = ModelConfig(name="t", n_layer=4, n_head=4, n_embd=32, n_ctx=40, vocab_size=150, init_std=0.3)
MODELS = {
    "GPT-2": SMALL,
    "GPT-1": replace(SMALL, norm=Norm.post),
    "dropout": replace(SMALL, dropout=0.3),
    "banded": replace(SMALL, attention="DB", band=6),
    "sparse": replace(SMALL, attention="DBSF", band=5, stride=4, summary=2),
}


def choices_of(seed: int) -> list[Pair]:
    """Contexts of several continuations: of one token, equal, the beginnings of others, and some that cut theirs."""
    lengths = [20, 15, 8, 33, 12, 1, 9, 4, 12, 12, 3, 1, 1, 12]
    a, b, c, long, *own = random_texts(lengths, SMALL.vocab_size, seed)
    pairs = [(a, own[0]), (a, own[0][:7] + own[2]), (a, own[1]), (b, own[3]), (a, own[2])]
    pairs += [(b, own[0]), (b, own[0][:5]), (b, own[0][:5]), (b, own[0]), (b, own[4])]
    pairs += [(c, text) for text in (own[6], own[7], own[8])]
    return pairs + [
        (long, text) for text in (own[0], own[2], own[4], own[5], own[6], own[9])
    ]  # 12 tokens cut 4, 9 cut 1


@pytest.mark.parametrize("name", MODELS)
def test_choices_equal_forwards_of_one_pair_alone(name: str, mesh: Mesh) -> None:
    seed = seeded()
    model, pairs = GPT(MODELS[name], mesh), choices_of(seed)
    initialise(model, MODELS[name], seed)
    for batch_size in (1, 3, 16):
        scores = score(model, pairs, batch_size=batch_size)
        with model.for_inference():
            for (context, continuation), got in zip(pairs, scores, strict=True):
                ids = (context + continuation)[-(SMALL.n_ctx + 1) :]
                all_BTV = model.logits(torch.tensor([ids[:-1]]))[:, -len(continuation) :].log_softmax(-1)
                expected = all_BTV[0].gather(-1, torch.tensor(continuation)[:, None])[:, 0]
                assert (got.log_p - expected).abs().max() <= 1e-6 * all_BTV.abs().max()
                assert torch.equal(got.greedy, all_BTV[0].argmax(-1) == torch.tensor(continuation))
                assert got.cut == max(0, len(context) + len(continuation) - SMALL.n_ctx - 1)
    assert [s.cut for s in scores].count(4) == 4 and [s.cut for s in scores].count(1) == 1


def test_scores_have_the_same_bits_in_any_order(mesh: Mesh) -> None:
    seed = seeded()
    model, pairs = GPT(SMALL, mesh), choices_of(seed)
    initialise(model, SMALL, seed)
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
    straight = score(model, pairs, batch_size=3)
    for i, got in zip(order, score(model, [pairs[i] for i in order], batch_size=3), strict=True):
        assert torch.equal(got.log_p, straight[i].log_p) and torch.equal(got.greedy, straight[i].greedy)


def test_a_context_that_choices_share_is_computed_once(mesh: Mesh) -> None:
    """With what their continuations have in common; the head sees each place once that is scored."""
    seed = seeded()
    model, tokens, places = ours(CFG, seed, mesh), [], []
    model.h[0].register_forward_pre_hook(lambda _, given: tokens.append(given[0].shape[:2].numel()))
    model.wte.register_forward_pre_hook(
        lambda _, given, how: places.append(len(given[0])) if how else None, with_kwargs=True
    )
    context, other, a, b = random_texts([40, 30, 9, 8], CFG.vocab_size, seed)
    score(model, [(context, a), (other, a), (context, b)])
    assert (tokens, places) == ([40 + 8 + 7, 30 + 8], [1 + 8 + 7, 9])
    tokens.clear(), places.clear()
    score(model, [(context, a[:6] + b[:3]), (context, a)])
    assert (tokens, places) == ([46 + 2 + 2], [7 + 2 + 2])
    tokens.clear(), places.clear()
    score(model, [(context, [1]), (context, [2]), (context, [3]), (context, [2])])
    assert (tokens, places) == ([40], [1])


def test_no_tensor_of_logits_is_larger_than_a_chunk(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = seeded()
    model, pairs = ours(CFG, seed, mesh), pairs_of(CFG, seed)
    rows = 8
    monkeypatch.setattr(plain_linear, "LOSS_CHUNK_BYTES", rows * 4 * 512)
    with Operations() as done:
        score(model, pairs)
    logits = {elements for _, elements in done.made if elements % 512 == 0 and elements > rows * 512}
    hidden = {elements for _, elements in done.made if elements % 64 == 0}
    assert logits <= hidden and (torch.float32, rows * 512) in done.made
    assert len(pairs) * 64 * 512 not in logits and sum(b for _, b in SPLITS) * 512 not in logits


def test_each_pair_is_in_one_call_of_on_batch(mesh: Mesh) -> None:
    """With the scores that are returned; what it raises comes out, and later batches are not computed."""
    seed = seeded()
    model, pairs = ours(CFG, seed, mesh), pairs_of(CFG, seed)
    calls: list[list[tuple[int, Scores]]] = []
    scores = score(model, pairs, batch_size=2, on_batch=calls.append)
    given = sorted((pair for call in calls for pair in call), key=lambda pair: pair[0])
    assert [i for i, _ in given] == list(range(len(pairs))) and max(map(len, calls)) <= 2
    assert all(got is scores[i] for i, got in given)

    def full(call: list[tuple[int, Scores]]) -> None:
        calls.append(call)
        raise OSError(28, "No space left on device")

    calls.clear()
    with pytest.raises(OSError, match="No space"):
        score(model, pairs, batch_size=2, on_batch=full)
    assert len(calls) == 1 and model.training and not model.inference


def test_whole_texts_are_scored_once_a_token_in_windows_of_n_ctx(mesh: Mesh) -> None:
    seed = seeded()
    model, hf = ours(CFG, seed, mesh), theirs(CFG, seed)
    texts = random_texts([1, 2, 65, 66, 200], CFG.vocab_size, seed)
    for ids, got in zip(texts, score_texts(model, texts), strict=True):
        expected = [log_p(hf, context, continuation) for context, continuation in harness_windows(ids, CFG.n_ctx)]
        assert len(got.log_p) == len(ids) - 1
        if expected:
            assert (got.log_p - torch.cat([x for x, _ in expected])).abs().max() <= 1e-5
            assert torch.equal(got.greedy, torch.cat([x for _, x in expected]))


def harness_windows(ids: list[int], n_ctx: int, context_len: int = 1) -> list[Pair]:
    """lm_eval.utils.get_rolling_token_windows and make_disjoint_window, with ids[0] as the prefix token."""
    prefix, tokens, out = ids[0], ids[1:], []
    if not tokens:
        return []
    first = min(n_ctx, len(tokens))
    out.append(([prefix, *tokens[: first - 1]], tokens[:first]))
    predicted = first
    while predicted < len(tokens):
        n = min(len(tokens) - predicted, n_ctx - context_len + 1)
        end = predicted + n
        out.append((tokens[end - n_ctx - 1 : end - 1], tokens[end - n : end]))
        predicted += n
    return [(a[: len(a) - (len(b) - 1)], b) for a, b in out]


@pytest.mark.parametrize("context", [1, 3, 8])
def test_windows_are_those_of_the_evaluation_harness(context: int) -> None:
    for n in range(1, 60):
        ids = list(range(n))
        got = windows(ids, 8, context)
        assert got == harness_windows(ids, 8, context)
        assert [token for _, continuation in got for token in continuation] == ids[1:]
        assert all(len(a) + len(b) <= 9 and (len(a) >= context or a[0] == 0) for a, b in got)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (([], [1]), "pair 0 has a context of 0 tokens"),
        (([1], [1] * 65), "a continuation of 65: give at least 1, and at most n_ctx=64"),
        (([1], [500]), "pair 0 holds token id 500"),
    ],
)
def test_a_pair_that_no_model_scores_is_refused(pair: Pair, message: str, mesh: Mesh) -> None:
    with pytest.raises(UserError, match=message):
        score(ours(CFG, 1, mesh), [pair])
