"""Direct preference optimisation in one process: its terms and gradients are those of plain torch, pair by pair."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.config import IGNORE
from data_pipeline.examples.pairs import Pair
from tests.helpers.seeds import seeded
from trainer.config.model import ModelConfig
from trainer.data.pairs import pairs as collated
from trainer.model.gpt import GPT
from trainer.model.init import initialise
from trainer.objective.language_model import token_log_p
from trainer.objective.preference import Pairs, Preference

BETA, N_CTX, V = 0.3, 128, 90
CFG = ModelConfig(name="tiny", n_layer=2, n_head=2, n_embd=32, n_ctx=N_CTX, vocab_size=V, init_std=0.1)


def model(mesh: Any, seed: int, **changes: Any) -> GPT:
    made = GPT(replace(CFG, **changes), mesh)
    initialise(made, CFG, seed)
    return made


def frozen(mesh: Any, seed: int) -> GPT:
    return model(mesh, seed).requires_grad_(False).eval()


def ragged(seed: int, n: int = 7, longest: int = 32) -> list[Pair]:
    rng = np.random.default_rng(seed)

    def ids() -> np.ndarray:
        return rng.integers(0, V, rng.integers(1, longest)).astype(np.int32)

    return [Pair(ids(), ids(), ids()) for _ in range(n)]


def batch(pairs: Sequence[Pair], *empty: Sequence[int]) -> Any:
    return collated(pairs, N_CTX)([*([i] for i in range(len(pairs))), *empty])


def plain_log_p(gpt: GPT, prompt: np.ndarray, answer: np.ndarray) -> Tensor:
    """The log-probability of an answer in a row of its own, by torch's own softmax."""
    ids = torch.from_numpy(np.concatenate([prompt, answer])).long()
    every = gpt.logits(ids[None, :-1]).log_softmax(-1)
    return every[0].gather(-1, ids[1:, None])[len(prompt) - 1 :].sum()


def plain_terms(policy: GPT, reference: GPT, pair: Pair) -> Tensor:
    chosen, rejected = (plain_log_p(policy, pair.prompt, x) for x in (pair.chosen, pair.rejected))
    base = [plain_log_p(reference, pair.prompt, x).detach() for x in (pair.chosen, pair.rejected)]
    margin = BETA * ((chosen - base[0]) - (rejected - base[1]))
    return torch.stack([-F.logsigmoid(margin), (margin > 0).float(), chosen, rejected, margin])


def test_terms_and_gradients_are_plain_torchs(mesh: Any) -> None:
    """On random pairs of other lengths, with a row that has none."""
    seed = seeded()
    pairs, policy, reference = ragged(seed), model(mesh, seed), frozen(mesh, seed + 1)
    twin = model(mesh, seed)
    objective = Preference(BETA, reference)
    made = batch(pairs, [])
    assert objective.counts(made) == [7.0] * 5
    sums = objective.sums(policy, made)
    sums[0].backward()
    want = sum(plain_terms(twin, reference, pair) for pair in pairs)
    assert isinstance(want, Tensor)
    want[0].backward()
    torch.testing.assert_close(sums, want, rtol=1e-4, atol=1e-4)
    for (name, p), (_, q) in zip(policy.named_parameters(), twin.named_parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        assert float((p.grad - q.grad).abs().max()) <= 2e-4 * float(q.grad.abs().max()), name


def test_the_first_loss_is_ln_2_and_no_dropout_is_drawn(mesh: Any) -> None:
    """The reference takes nothing from the generator that the policy's dropout draws from."""
    seed = seeded()
    made, reference = batch(ragged(seed)), frozen(mesh, seed)
    sums = Preference(BETA, reference).sums(model(mesh, seed), made).detach()
    assert float(sums[0]) / 7 == pytest.approx(math.log(2), abs=1e-4)
    assert float(sums[1]) == 3.5 and float(sums[4]) == 0
    wet = model(mesh, seed, dropout=0.5).train()
    torch.manual_seed(seed)
    drawn = Preference(BETA, reference).sums(wet, made).detach()
    torch.manual_seed(seed)
    alone = token_log_p(wet, made.tokens, made.labels).sum(-1).chunk(2)
    torch.testing.assert_close(drawn[2:4], torch.stack(alone).sum(-1))
    assert float(drawn[4]) != 0


def test_swapped_answers_negate_the_margin(mesh: Any) -> None:
    seed = seeded()
    pairs = ragged(seed)
    objective, policy = Preference(BETA, frozen(mesh, seed + 1)), model(mesh, seed)
    one = objective.sums(policy, batch(pairs)).detach()
    other = objective.sums(policy, batch([Pair(p, rejected, chosen) for p, chosen, rejected in pairs])).detach()
    torch.testing.assert_close(other[4], -one[4])
    torch.testing.assert_close(other[[3, 2]], one[[2, 3]])
    assert float(one[1] + other[1]) == 7


def test_pads_and_rows_without_a_pair_change_nothing(mesh: Any) -> None:
    seed = seeded()
    made = batch(ragged(seed))
    policy, objective = model(mesh, seed), Preference(BETA, frozen(mesh, seed + 1))
    width = made.tokens.shape[1]
    more = Pairs(F.pad(made.tokens, (0, N_CTX - width), value=5), F.pad(made.labels, (0, N_CTX - width), value=IGNORE))
    assert width < N_CTX
    torch.testing.assert_close(objective.sums(policy, more), objective.sums(policy, made))
    nothing = batch([], [], [])
    assert objective.counts(nothing) == [0.0] * 5
    sums = objective.sums(policy, nothing)
    sums[0].backward()
    assert sums.tolist() == [0.0] * 5
    assert all(p.grad is not None and float(p.grad.abs().max()) == 0 for p in policy.parameters())


def test_a_prompt_gets_no_gradient_as_a_label(mesh: Any) -> None:
    """Of the logits, those before an answer's token and its end token alone."""
    seed = seeded()
    made, policy = batch(ragged(seed)), model(mesh, seed)
    kept: list[Tensor] = []

    def keep(_: Any, __: Any, out: Tensor) -> None:
        if out.shape[-1] >= V:
            out.retain_grad()
            kept.append(out)

    policy.wte.register_forward_hook(keep)
    Preference(BETA, frozen(mesh, seed + 1)).sums(policy, made)[0].backward()
    [logits_TBV] = kept
    assert logits_TBV.grad is not None
    learns_BT = (logits_TBV.grad.abs().amax(-1) > 0).t()
    assert torch.equal(learns_BT, made.labels != IGNORE)


def planted(rng: random.Random, n: int) -> list[Pair]:
    """The answer with more of ids below 10 is the better one."""
    pairs = []
    for _ in range(n):
        ids = [np.array([rng.randrange(10 if rng.random() < share else V) for _ in range(8)]) for share in (0.6, 0.1)]
        answers = sorted((x.astype(np.int32) for x in ids), key=lambda x: -int((x < 10).sum()))
        if (answers[0] < 10).sum() > (answers[1] < 10).sum():
            pairs.append(Pair(np.array([1, rng.randrange(V)], np.int32), *answers))
    return pairs


def trained(mesh: Any, sign: float) -> tuple[float, float, float]:
    """Accuracy on pairs that were not trained on, the share of good ids that is sampled next, and the KL divergence."""
    torch.manual_seed(0)
    rng = random.Random(0)
    train, held_out = planted(rng, 300), planted(rng, 100)
    policy, reference = model(mesh, 3), frozen(mesh, 3)
    objective = Preference(BETA, reference)
    adam = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0.0)
    for step in range(30):
        made = collated(train, 16)([[i] for i in range(8 * step, 8 * step + 8)])
        adam.zero_grad()
        (sign * objective.sums(policy, made)[0] / 8).backward()
        adam.step()
    with torch.no_grad():
        made = collated(held_out, 16)([[i] for i in range(len(held_out))])
        accuracy = float(objective.sums(policy, made)[1]) / objective.counts(made)[1]
        prompts = torch.tensor([pair.prompt.tolist() for pair in held_out])
        p, q = (gpt.logits(prompts)[:, -1].log_softmax(-1) for gpt in (policy, reference))
    return accuracy, float(p.exp()[:, :10].sum(-1).mean()), float((p.exp() * (p - q)).sum(-1).mean())


def test_planted_preferences_are_learnt_within_a_kl_bound(mesh: Any) -> None:
    """Against the loss with its sign flipped, which fails each of the three."""
    accuracy, good, kl = trained(mesh, 1.0)
    wrong, bad, _ = trained(mesh, -1.0)
    assert accuracy > 0.9 and good > 0.2 and kl < 1
    assert wrong < 0.1 and bad < 0.1
