"""The ranking loss and its figures against a loop over pairs, and what must not change them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.examples.read import Preference
from tests.distributed import tiny_run
from tests.helpers.ranked import random_preferences, shuffled
from tests.helpers.seeds import seeded
from trainer.data.comparisons import comparisons
from trainer.distributed.mesh import Mesh
from trainer.model.init import initialise
from trainer.objective.heads import WithHead
from trainer.objective.ranking import Comparisons, Ranking

VOCAB, LONGEST = 60, tiny_run.N_CTX
OBJECTIVE = Ranking()


@pytest.fixture(scope="module")
def module(mesh: Mesh) -> WithHead:
    cfg = tiny_run.model_config(vocab_size=VOCAB)
    made = WithHead(cfg, mesh, n_out=1, std=1 / math.sqrt(cfg.n_embd + 1))
    initialise(made, cfg, 3)
    with torch.no_grad():
        made.head.bias.fill_(0.7)
    return made


def batch_of(some: Sequence[Preference], extra: int = 0, n_ctx: int = LONGEST, multiple: int = 4) -> Comparisons:
    batch = comparisons(some, n_ctx, multiple)([*([i] for i in range(len(some))), *[[]] * extra])
    assert isinstance(batch, Comparisons)
    return batch


def figures(module: WithHead, batch: Comparisons) -> tuple[list[float], list[float]]:
    """(sums, counts)"""
    return OBJECTIVE.sums(module, batch).tolist(), OBJECTIVE.counts(batch)


def gradients(module: WithHead, loss: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def brute_force(module: WithHead, some: Sequence[Preference]) -> tuple[Tensor, list[float], list[float]]:
    """The loss, and all sums and counts: each answer by itself, without padding, and a loop over pairs."""
    loss, right, pairs, everything = torch.zeros(()), 0.0, 0, []
    for item in some:
        scores = []
        for answer in item.answers:
            ids = torch.from_numpy(np.concatenate([item.prompt, answer])).long()[None]
            x_C = module.hidden(ids)[-1, 0]
            scores.append(module.head.weight[0] @ x_C + module.head.bias[0])
        k, own = len(scores), torch.zeros(())
        for i, j in itertools.permutations(range(k), 2):
            if item.ranks[i] < item.ranks[j]:
                own = own - torch.log(1 / (1 + torch.exp(scores[j] - scores[i])))
                right += float(scores[i] > scores[j])
                pairs += 1
        loss = loss + own / (k * (k - 1) / 2)
        everything += [float(score.detach()) for score in scores]
    n = len(everything)
    sums = [float(loss.detach()), right, sum(everything), sum(score**2 for score in everything)]
    return loss, sums, [len(some), pairs, n, n]


def test_loss_gradient_and_figures_are_those_of_a_loop(module: WithHead) -> None:
    """Over random comparisons with ties, of 2 to 5 answers of all lengths."""
    some = random_preferences(np.random.default_rng(seeded()), 6, vocab_size=VOCAB, longest=LONGEST)
    loss, sums, counts = brute_force(module, some)
    want = gradients(module, loss)
    batch = batch_of(some, extra=2)
    got_sums, got_counts = figures(module, batch)
    assert got_counts == counts
    assert got_sums == pytest.approx(sums, rel=1e-4, abs=1e-5)
    got = gradients(module, OBJECTIVE.sums(module, batch)[0])
    assert got.keys() == want.keys() and "head.weight" in want
    largest = max(float(grad.abs().max()) for grad in want.values())
    for name, grad in want.items():
        assert float((got[name] - grad).abs().max()) <= 1e-5 * largest, name


def test_two_answers_are_the_pairwise_logistic_loss(module: WithHead) -> None:
    some = random_preferences(
        np.random.default_rng(seeded()), 5, vocab_size=VOCAB, longest=LONGEST, ks=(2, 2), ties=False
    )
    batch = batch_of(some)
    score_R = module.head(module.hidden(batch.tokens), batch.ends)[:, 0]
    margins = [score_R[2 * n + int(r.ranks[0])] - score_R[2 * n + int(r.ranks[1])] for n, r in enumerate(some)]
    want = F.binary_cross_entropy_with_logits(torch.stack(margins), torch.ones(len(some)), reduction="sum")
    assert OBJECTIVE.sums(module, batch).tolist()[0] == pytest.approx(want.item(), rel=1e-6)


def test_pads_dummies_and_the_order_change_nothing(module: WithHead) -> None:
    rng = np.random.default_rng(seeded())
    some = random_preferences(rng, 4, vocab_size=VOCAB, longest=LONGEST - 4)
    sums, counts = figures(module, batch_of(some, multiple=1))
    turned = [shuffled(rng, item) for item in some]
    padded = batch_of(some, n_ctx=LONGEST, multiple=LONGEST)
    noise = torch.arange(padded.tokens.shape[1]) > padded.ends[:, None]
    other_pads = padded._replace(tokens=padded.tokens.where(~noise, VOCAB - 1))
    for other in (batch_of(some, extra=3), padded, other_pads, batch_of(turned), batch_of(turned[::-1])):
        got = figures(module, other)
        assert got[1] == counts
        assert got[0] == pytest.approx(sums, rel=1e-5, abs=1e-5)


def test_rows_without_a_comparison_have_a_gradient_of_zero(module: WithHead) -> None:
    """A micro batch of them runs the same modules, and so does one of ties alone."""
    tie = Preference(np.array([1, 2], np.int32), (np.array([3]), np.array([4])), np.zeros(2, np.int32))
    for batch, counts in ((batch_of([], extra=2), [0.0] * 4), (batch_of([tie]), [1.0, 0.0, 2.0, 2.0])):
        assert OBJECTIVE.counts(batch) == counts
        sums = OBJECTIVE.sums(module, batch)
        grads = gradients(module, sums[0])
        assert sums[0] == 0 and sums[1] == 0 and "head.weight" in grads
        assert all(bool((grad == 0).all()) for grad in grads.values())


def test_equal_scores_are_half_a_pair_in_the_right_order(module: WithHead) -> None:
    batch = batch_of(random_preferences(np.random.default_rng(1), 1, vocab_size=VOCAB, longest=LONGEST))
    same = batch._replace(pairs=torch.zeros(3, 2, dtype=torch.int64), weights=torch.ones(3))
    assert OBJECTIVE.sums(module, same)[1] == 1.5


def test_lengths_are_multiples_and_at_most_n_ctx() -> None:
    item = random_preferences(np.random.default_rng(1), 1, vocab_size=VOCAB, longest=100)[0]._replace(
        answers=(np.zeros(30, np.int32), np.zeros(50, np.int32)), prompt=np.zeros(20, np.int32), ranks=np.arange(2)
    )
    assert comparisons([item], 1024)([[0]])[0].shape == (2, 80)  # type: ignore[union-attr]
    assert comparisons([item], 75)([[0]])[0].shape == (2, 75)  # type: ignore[union-attr]
    assert comparisons([item], 1024, 192)([[0], []])[0].shape == (3, 192)  # type: ignore[union-attr]
