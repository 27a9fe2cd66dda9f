"""Sampling against plain definitions of temperature, top-k and top-p."""

from __future__ import annotations

import math

import pytest
import torch

from conf.errors import UserError
from trainer.config.generate import GenerateConfig
from trainer.generate import Sampler


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
    drawn = Sampler(temperature, top_k, top_p)(logits.expand(n, -1), u)
    for token in range(9):
        assert (drawn == token).sum().item() / n == pytest.approx(expected.get(token, 0.0), abs=2e-5)


def test_temperature_zero_takes_the_likeliest() -> None:
    logits = torch.randn(5, 11)
    assert torch.equal(Sampler(0.0, None, None)(logits, torch.rand(5)), logits.argmax(-1))


def test_u_next_to_one_draws_a_token_that_is_allowed() -> None:
    drawn = Sampler(1.0, 2, None)(
        torch.tensor([[0.0, 1.0, 2.0, 3.0]]), torch.tensor([1.0 - 2**-53], dtype=torch.float64)
    )
    assert drawn.item() in (2, 3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give exactly one of prompt, prompt_file and prompt_ids; given: none"),
        ({"prompt": "a", "prompt_file": "b"}, "given: prompt, prompt_file"),
        ({"prompt": "a", "temperature": -1.0}, "temperature=-1.0"),
        ({"prompt": "a", "top_k": 0}, "top_k=0"),
        ({"prompt": "a", "top_p": 0.0}, "top_p=0.0"),
        ({"prompt": "a", "max_new_tokens": 0}, "max_new_tokens=0"),
    ],
)
def test_an_impossible_request_is_refused_by_its_name(given: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        GenerateConfig(checkpoint="x", **given)
