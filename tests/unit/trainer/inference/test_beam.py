"""Beam search against all texts there are, against transformers, and against a plain twin without a cache."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from conf.errors import UserError
from tests.helpers.gpt_twins import CFG, ours, random_texts, theirs
from tests.helpers.seeds import seeded
from trainer.config.model import ModelConfig, Norm
from trainer.distributed.mesh import Mesh
from trainer.inference.beam import Beam, Hypothesis, beam_search
from trainer.inference.requests import Sampling
from trainer.inference.sampler import Stop, sample
from trainer.model.gpt import GPT
from trainer.model.init import initialise

TINY = ModelConfig(name="t", n_layer=2, n_head=2, n_embd=16, n_ctx=12, vocab_size=5, init_std=0.4)
SMALL = ModelConfig(name="t", n_layer=3, n_head=4, n_embd=32, n_ctx=40, vocab_size=150, init_std=0.3)
EOT = 4
ULP = 2e-6  # of a logit between 16 and 32 in fp32: what a token's log-probability may be apart by


def build(cfg: ModelConfig, seed: int, mesh: Mesh) -> GPT:
    model = GPT(cfg, mesh)
    initialise(model, cfg, seed)
    return model


def log_p(model: GPT, prompt: list[int], texts: list[list[int]]) -> torch.Tensor:
    """The log-probability of each beginning of each text, all of one length, [texts, tokens]; no cache."""
    with model.for_inference():
        logits = model.logits(torch.tensor([prompt + new for new in texts]))[:, len(prompt) - 1 : -1].double()
    return logits.log_softmax(-1).gather(-1, torch.tensor(texts)[..., None])[..., 0].cumsum(-1)


def penalised(x: float, n: int, alpha: float) -> float:
    return x / math.exp(alpha * math.log((5 + n) / 6))


@pytest.mark.parametrize("alpha", [0.0, 0.6, 3.0])
def test_a_beam_that_holds_all_texts_finds_the_best_one(alpha: float, mesh: Mesh) -> None:
    """A large alpha prefers long texts, and none shorter ones: both ends of a text matter."""
    seed, steps = seeded(), 4
    model = build(TINY, seed, mesh)
    prompts = random_texts([1, 7, 3], TINY.vocab_size, seed)
    found = beam_search(model, prompts, Beam(4**steps, alpha), max_new_tokens=steps, eot=EOT)
    for prompt, got in zip(prompts, found, strict=True):
        every = [list(text) for text in itertools.product(range(5), repeat=steps)]
        scores = {}
        for text, sums in zip(every, log_p(model, prompt, every).tolist(), strict=True):
            n = text.index(EOT) + 1 if EOT in text else steps
            scores[tuple(text[:n])] = sums[n - 1], penalised(sums[n - 1], n, alpha)
        best = max(scores, key=lambda text: scores[text][1])
        assert got.new == list(best)
        assert (got.log_p, got.score) == pytest.approx(scores[best], abs=steps * ULP)


def twin(
    model: GPT, prompt: list[int], width: int, alpha: float, steps: int, eot: int | None, stop: Stop | None
) -> Hypothesis:
    """The definition, step by step up to the last one: no cache, batch or early end."""
    beam: dict[tuple[int, ...], float] = {(): 0.0}
    ended: dict[tuple[int, ...], float] = {}
    for n in range(1, steps + 1):
        with model.for_inference():
            next_p = model.logits(torch.tensor([[*prompt, *new] for new in beam]))[:, -1].double().log_softmax(-1)
        sums = {
            (*new, token): so_far + p
            for (new, so_far), every in zip(beam.items(), next_p.tolist(), strict=True)
            for token, p in enumerate(every)
        }
        order = sorted(sums, key=lambda text: -sums[text])[: 2 * width]
        ends = {t: t[-1] == eot or n == steps or (stop is not None and stop(0, list(t))) for t in order}
        ended |= {t: sums[t] for t in order[:width] if ends[t]}
        beam = {t: sums[t] for t in [t for t in order if not ends[t]][:width]}
    best = max(ended, key=lambda t: penalised(ended[t], len(t), alpha))
    return Hypothesis(list(best), ended[best], penalised(ended[best], len(best), alpha))


@pytest.mark.parametrize("name", ["GPT-2", "GPT-1", "sparse"])
@pytest.mark.parametrize("alpha", [0.0, 0.6])
def test_ragged_prompts_find_what_a_plain_search_finds(name: str, alpha: float, mesh: Mesh) -> None:
    """With an end of text that is likely enough to come, a stop, and in batches of any size."""
    how: dict[str, dict[str, Any]] = {
        "GPT-1": {"norm": Norm.post},
        "sparse": {"attention": "DBS", "band": 5, "stride": 4},
    }
    seed, steps = seeded(), 7
    model = build(replace(SMALL, **how.get(name, {})), seed, mesh)
    prompts = random_texts([1, 20, 8, 33, 8, 2], SMALL.vocab_size, seed)
    eot = beam_search(model, prompts[1:2], Beam(4, 0.0), max_new_tokens=steps)[0].new[2]  # one that does come

    def stop(index: int, new: list[int]) -> bool:
        return len(new) > 1 and sum(new[-2:]) % 7 == 0

    lengths = set()
    for last, end in ((None, None), (eot, None), (eot, stop)):
        expected = [twin(model, prompt, 4, alpha, steps, last, end) for prompt in prompts]
        for batch_size in (1, 8, 100):
            found = beam_search(
                model, prompts, Beam(4, alpha), max_new_tokens=steps, eot=last, stop=end, batch_size=batch_size
            )
            assert [h.new for h in found] == [h.new for h in expected]
            assert [h.score for h in found] == pytest.approx([h.score for h in expected], abs=steps * ULP)
        lengths |= {len(h.new) for h in expected}
    assert steps in lengths and (alpha > 0 or min(lengths) < steps)  # a shorter text is the likelier one


@pytest.mark.parametrize("norm", Norm, ids=lambda n: n.value)
@pytest.mark.parametrize("eot", [None, 7])
def test_texts_equal_transformers_beams(norm: Norm, eot: int | None, mesh: Mesh) -> None:
    """Where both define the same: without a penalty, or of texts of one length, which no penalty ranks."""
    cfg, seed = replace(CFG, norm=norm), seeded()
    hf, model = theirs(cfg, seed), ours(cfg, seed, mesh)
    prompts = random_texts([1, 9, 30], cfg.vocab_size, seed)
    if eot is not None:
        eot = beam_search(model, prompts[:1], Beam(4, 0.0), max_new_tokens=6)[0].new[3]
    alpha = 0.0 if eot is not None else 0.6
    found = beam_search(model, prompts, Beam(4, alpha), max_new_tokens=8, eot=eot)
    for prompt, got in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        beams = {"num_beams": 4, "length_penalty": 0.0, "early_stopping": "never", "do_sample": False}
        mask = torch.ones_like(ids)
        expected = hf.generate(ids, attention_mask=mask, max_new_tokens=8, eos_token_id=eot, pad_token_id=0, **beams)[
            0, len(prompt) :
        ].tolist()
        assert got.new == (expected[: expected.index(eot) + 1] if eot in expected else expected)


def test_a_beam_of_one_is_greedy_and_limits_hold(mesh: Mesh) -> None:
    seed = seeded()
    model, prompts = build(SMALL, seed, mesh), random_texts([5, 36, 40, 12], SMALL.vocab_size, seed)
    limits = [6, 30, 30, 0]
    greedy = sample(model, prompts, Sampling(0.0), max_new_tokens=limits)
    found = beam_search(model, prompts, Beam(1), max_new_tokens=limits)
    assert [h.new for h in found] == greedy and [len(new) for new in greedy] == [6, 4, 0, 0]
    assert beam_search(model, [], Beam(), max_new_tokens=3) == [] and model.training


def test_a_search_ends_when_nothing_can_be_better(mesh: Mesh) -> None:
    """A text that ends at once with more than half of the probability is found in one step."""
    seed = seeded()
    model = build(replace(TINY, init_std=1.0), seed, mesh)
    prompts = [list(ids) for ids in itertools.product(range(5), repeat=2)]
    first = sample(model, prompts, Sampling(0.0), max_new_tokens=1)
    p, i = max(
        (float(log_p(model, prompt, [new])), i) for i, (prompt, new) in enumerate(zip(prompts, first, strict=True))
    )
    assert p > math.log(0.5)
    forwards: list[int] = []
    model.ln_f.register_forward_pre_hook(lambda _, given: forwards.append(1))
    (got,) = beam_search(model, [prompts[i]], Beam(4, 0.0), max_new_tokens=9, eot=first[i][0])
    assert got.new == first[i] and got.log_p == pytest.approx(p, abs=5 * ULP) and len(forwards) == 1


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "prompt 1 has 0 tokens"), ([0] * 41, "prompt 1 has 41 tokens"), ([150], "prompt 1 holds token id 150")],
)
def test_a_prompt_that_no_model_continues_is_refused(prompt: list[int], message: str, mesh: Mesh) -> None:
    with pytest.raises(UserError, match=message):
        beam_search(GPT(SMALL, mesh), [[1], prompt], Beam(), max_new_tokens=1)
    with pytest.raises(UserError, match="a beam of width=0"):
        Beam(width=0)


def test_the_penalty_is_that_of_wu_et_al() -> None:
    assert Beam(4, 0.6).score(-3.0, 1) == -3.0 and Beam(4, 1.0).score(-3.0, 7) == -1.5
    assert Beam().score(-2.0, 25) == pytest.approx(-2.0 / 5**0.6)
