"""Sampling: draws against plain definitions, texts against transformers and against forwards without a cache."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from conf.errors import UserError
from tests.helpers.gpt_twins import CFG, greedy, ours, random_texts, theirs
from tests.helpers.operations import Operations
from tests.helpers.seeds import seeded
from trainer.config.model import ModelConfig, Norm
from trainer.distributed.mesh import Mesh
from trainer.inference.requests import Sampling
from trainer.inference.sampler import NUCLEUS, draw, sample
from trainer.model.gpt import GPT
from trainer.model.init import initialise


def allowed(logits: list[float], temperature: float, top_k: int | None, top_p: float | None) -> dict[int, float]:
    """Token -> probability, by the words of the definitions."""
    weight = {i: math.exp(x / temperature) for i, x in enumerate(logits)}
    total = sum(weight.values())
    best = sorted(weight, key=lambda i: -weight[i])
    if top_k is not None:
        best = best[:top_k]
    kept, mass = [], 0.0
    for i in best:
        if top_p is not None and mass >= top_p:
            break
        kept.append(i)
        mass += weight[i] / total
    left = sum(weight[i] for i in kept)
    return {i: weight[i] / left for i in kept}


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, None, None), (0.5, None, None), (2.0, 3, None), (1.0, None, 0.7), (0.8, 5, 0.5), (1.0, 1, None)],
)
def test_draws_have_the_probabilities_that_the_definitions_say(
    temperature: float, top_k: int | None, top_p: float | None
) -> None:
    logits = torch.randn(9, generator=torch.Generator().manual_seed(3))
    expected = allowed(logits.tolist(), temperature, top_k, top_p)
    n = 200_000
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n  # a grid: the counts are the probabilities, to 1 in n
    drawn = draw(Sampling(temperature, top_k, top_p), logits.expand(n, -1), u)
    for token in range(9):
        assert (drawn == token).sum().item() / n == pytest.approx(expected.get(token, 0.0), abs=2e-5)


def test_temperature_zero_takes_the_likeliest() -> None:
    logits = torch.randn(5, 11)
    assert torch.equal(draw(Sampling(0.0, None, None), logits, torch.rand(5)), logits.argmax(-1))


def test_u_next_to_one_draws_a_token_that_is_allowed() -> None:
    drawn = draw(
        Sampling(1.0, 2, None), torch.tensor([[0.0, 1.0, 2.0, 3.0]]), torch.tensor([1.0 - 2**-53], dtype=torch.float64)
    )
    assert drawn.item() in (2, 3)


def by_a_full_sort(sampling: Sampling, logits_BV: Tensor, u_B: Tensor) -> Tensor:
    """The definition by a stable sort of the whole vocabulary in fp64."""
    p_BV, id_BV = (logits_BV.double() / sampling.temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    p_BV[:, sampling.top_k or len(p_BV[0]) :] = 0
    if sampling.top_p is not None:
        p_BV[p_BV.cumsum(-1) - p_BV >= sampling.top_p] = 0
    mass_BV = p_BV.cumsum(-1)
    return id_BV.gather(-1, (mass_BV <= u_B[:, None] * mass_BV[:, -1:]).sum(-1, keepdim=True)).squeeze(-1)


@pytest.mark.parametrize("scale", [0.1, 3.0])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(1, None), (40, None), (5000, None), (None, 0.5), (None, 0.95), (700, 0.9)]
)
def test_top_k_and_top_p_draw_what_a_full_sort_draws(top_k: int | None, top_p: float | None, scale: float) -> None:
    """Also for nuclei of more candidates than are looked at first."""
    generator = torch.Generator().manual_seed(seeded())
    logits = torch.randn(64, 3000, generator=generator) * scale
    u = torch.rand(64, generator=generator, dtype=torch.float64)
    sampling = Sampling(0.8, top_k, top_p)
    assert torch.equal(draw(sampling, logits, u), by_a_full_sort(sampling, logits, u))


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(top_k=50), Sampling(top_p=0.9), Sampling(top_k=9, top_p=0.9)]
)
def test_a_rows_draw_does_not_depend_on_the_other_rows(sampling: Sampling) -> None:
    """In bf16, where many tokens have one probability, and with nuclei of very different sizes."""
    generator = torch.Generator().manual_seed(seeded())
    logits = torch.randn(40, 2000, generator=generator) * torch.logspace(-2, 1, 40)[:, None]
    logits, u = logits.bfloat16(), torch.rand(40, generator=generator, dtype=torch.float64)
    alone = [draw(sampling, logits[i : i + 1], u[i : i + 1]) for i in range(40)]
    assert torch.equal(draw(sampling, logits, u), torch.cat(alone))


@pytest.mark.parametrize(
    ("sampling", "kinds"), [(Sampling(), set()), (Sampling(0.0), set()), (Sampling(top_k=5), {"aten.topk.default"})]
)
def test_nothing_is_sorted_that_no_option_needs(sampling: Sampling, kinds: set[str]) -> None:
    with Operations() as done:
        draw(sampling, torch.randn(4, 5000), torch.rand(4, dtype=torch.float64))
    assert {kind for kind in done.calls if "sort" in kind.replace("searchsorted", "") or "topk" in kind} == kinds


def test_top_p_sorts_only_as_many_candidates_as_its_rows_need() -> None:
    with Operations() as done:
        draw(Sampling(top_p=0.9), torch.randn(4, 5000) * 20, torch.rand(4, dtype=torch.float64))
    assert done.calls["aten.topk.default"] == 1 and (torch.float64, 4 * NUCLEUS) in done.made
    assert not any("sort" in kind.replace("searchsorted", "") for kind in done.calls)


@pytest.mark.parametrize("temperature", [1e-30, 1e-3, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_temperatures_and_logits_draw_possible_tokens(dtype: torch.dtype, temperature: float) -> None:
    logits = torch.tensor([[-3e4, 3e4, -torch.inf, 0.0]], dtype=dtype).expand(3, -1)
    drawn = draw(Sampling(temperature), logits, torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64))
    assert 2 not in drawn.tolist() and (temperature == 1e4 or drawn.tolist() == [1, 1, 1])


# ---- texts


def build(mesh: Mesh, cfg: ModelConfig, seed: int) -> GPT:
    model = GPT(cfg, mesh)
    initialise(model, cfg, seed)
    return model


SMALL = ModelConfig(name="t", n_layer=4, n_head=4, n_embd=32, n_ctx=40, vocab_size=150, init_std=0.3)
LENGTHS = [1, 30, 2, 17, 17, 9, 28]
MODELS = {
    "GPT-1": replace(SMALL, norm=Norm.post),
    "dropout": replace(SMALL, dropout=0.3),
    "banded": replace(SMALL, attention="DB", band=6),
    "sparse": replace(SMALL, attention="DBSF", band=5, stride=4, summary=2),
}


def without_cache(model: GPT, prompt: list[int], n: int) -> list[int]:
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(model.logits(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", MODELS)
def test_ragged_greedy_texts_equal_forwards_without_a_cache(name: str, mesh: Mesh) -> None:
    seed, n = seeded(), 10
    model, prompts = build(mesh, MODELS[name], seed), random_texts(LENGTHS, SMALL.vocab_size, seed)
    got = sample(model, prompts, Sampling(0.0), max_new_tokens=n, batch_size=4)
    assert model.training and not model.inference  # left as it was
    model.eval()
    with torch.no_grad():
        assert got == [without_cache(model, prompt, n) for prompt in prompts]


@pytest.mark.parametrize("norm", Norm, ids=lambda n: n.value)
def test_32_prompts_of_32_lengths_equal_transformers_one_by_one(norm: Norm, mesh: Mesh) -> None:
    cfg, seed = replace(CFG, norm=norm), seeded()
    prompts = random_texts(list(range(1, 33)), cfg.vocab_size, seed)
    got = sample(ours(cfg, seed, mesh), prompts, Sampling(0.0), max_new_tokens=20, batch_size=32)
    hf = theirs(cfg, seed)
    assert got == [greedy(hf, prompt, 20) for prompt in prompts]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7, top_k=20), Sampling(top_p=0.9)])
def test_draws_depend_on_seed_key_and_token_number_alone(sampling: Sampling, mesh: Mesh) -> None:
    seed = seeded()
    model, prompts = build(mesh, SMALL, seed), random_texts(LENGTHS, SMALL.vocab_size, seed)

    def texts(prompts: list[list[int]], **how: Any) -> list[list[int]]:
        return sample(model, prompts, sampling, **{"max_new_tokens": 10, "seed": 5, **how})

    expected = texts(prompts)
    assert texts(prompts, batch_size=1) == texts(prompts, batch_size=3) == expected
    assert texts(prompts[::-1], keys=range(len(LENGTHS))[::-1]) == expected[::-1]
    assert texts(prompts[2:], keys=range(2, len(LENGTHS))) == expected[2:]  # as on a rank with a part of the list
    assert texts(prompts, max_new_tokens=4) == [text[:4] for text in expected]
    assert texts(prompts, seed=6) != expected
    twice = texts([prompts[1], prompts[1]])
    assert twice[0] != twice[1]


def test_texts_end_at_eot_limit_stop_or_the_context(mesh: Mesh) -> None:
    seed = seeded()
    model, prompts = build(mesh, SMALL, seed), random_texts([5, 36, 20, 40, 7], SMALL.vocab_size, seed)
    free = sample(model, prompts, Sampling(), max_new_tokens=30)
    assert [len(text) for text in free] == [30, 4, 20, 0, 30]
    eot = free[4][6]
    to_eot = sample(model, prompts, Sampling(), max_new_tokens=30, eot=eot)
    assert to_eot == [text[: text.index(eot) + 1] if eot in text else text for text in free]
    limits = [3, 9, 0, 2, 17]
    assert sample(model, prompts, Sampling(), max_new_tokens=limits) == [
        text[:n] for text, n in zip(free, limits, strict=True)
    ]
    seen: list[int] = []

    def stop(index: int, new: list[int]) -> bool:
        seen.append(index)
        return index == 0 and len(new) == 2

    assert sample(model, prompts, Sampling(), max_new_tokens=5, stop=stop) == [free[0][:2], *(t[:5] for t in free[1:])]
    assert [seen.count(i) for i in range(5)] == [2, 4, 5, 0, 5]
    assert sample(model, [], Sampling(), max_new_tokens=5) == []


@pytest.mark.parametrize("slide", [1, 7, 40])
def test_texts_beyond_n_ctx_see_the_last_tokens_alone(slide: int, mesh: Mesh) -> None:
    """One forward for each token over what its window holds: prompts below, at and beyond n_ctx in one batch."""
    seed, n = seeded(), 55
    model, prompts = build(mesh, SMALL, seed), random_texts([1, 20, 39, 40, 41, 90], SMALL.vocab_size, seed)
    got = sample(model, prompts, Sampling(0.0), max_new_tokens=[n, 7, n, n, 3, n], slide=slide, batch_size=4)
    model.eval()
    with torch.no_grad():
        for prompt, text, limit in zip(prompts, got, [n, 7, n, n, 3, n], strict=True):
            ids = list(prompt)
            for _ in range(limit):
                first = next(w for w in range(0, 1000, slide) if len(ids) - w <= 40)
                ids += without_cache(model, ids[first:], 1)
            assert prompt + text == ids
    drawn = sample(model, prompts, Sampling(), max_new_tokens=n, slide=slide)
    within = sample(model, prompts[:4], Sampling(), max_new_tokens=n)
    assert [text[: len(short)] for text, short in zip(drawn, within, strict=False)] == within
    assert drawn == sample(model, prompts, Sampling(), max_new_tokens=n, slide=slide, batch_size=1)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "prompt 1 has 0 tokens"), ([0] * 41, "prompt 1 has 41 tokens"), ([150], "prompt 1 holds token id 150")],
)
def test_a_prompt_that_no_model_continues_is_refused(prompt: list[int], message: str, mesh: Mesh) -> None:
    with pytest.raises(UserError, match=message):
        sample(GPT(SMALL, mesh), [[1], prompt], Sampling(), max_new_tokens=1)
