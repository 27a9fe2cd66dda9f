"""Sampling, search and scoring on two ranks give transformers' texts and log-probabilities of one prompt at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from conf.errors import UserError
from tests.distributed import tiny_run as run
from tests.helpers.gpt_twins import greedy, log_p, random_texts
from tests.helpers.ranks import run_ranks
from tests.helpers.seeds import seeded
from trainer.hf.weights import hf_config, to_hf
from trainer.inference.beam import Beam, beam_search
from trainer.inference.requests import Pair, Sampling
from trainer.inference.sampler import sample
from trainer.inference.scorer import Scores, score
from trainer.model.gpt import GPT
from trainer.model.init import initialise

MODEL = {"n_ctx": 64, "init_std": 0.3}
CFG = run.model_config(**MODEL)
LENGTHS = list(range(1, 33))
NEW = 20
CASES = ("tp2", "tp2 sequence parallel", "zero3", "zero3, no prompts on rank 1")


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(2, "tests.distributed.trainer.inference.test_inference:measure", seed=seeded())


@pytest.mark.parametrize("case", CASES)
def test_32_prompts_of_32_lengths_equal_transformers(case: str, ranks: list[dict[str, Any]]) -> None:
    """Under ZeRO-3 the ranks have different numbers of prompts of different lengths, some of which end early."""
    for rank in ranks:
        assert rank[case]["texts"] == rank[case]["expected"]
    assert sum(len(rank[case]["texts"]) for rank in ranks) == (64 if case.startswith("tp2") else 32)


@pytest.mark.parametrize("case", CASES)
def test_texts_beyond_n_ctx_equal_transformers_windows(case: str, ranks: list[dict[str, Any]]) -> None:
    assert all(rank[case]["beyond"] == rank[case]["expected beyond"] for rank in ranks)


@pytest.mark.parametrize("case", CASES)
def test_scores_equal_transformers(case: str, ranks: list[dict[str, Any]]) -> None:
    """Of prompts with their texts, and of four choices that share a prompt."""
    assert all(rank[case]["score_error"] <= 1e-5 and rank[case]["greedy_equal"] for rank in ranks)


@pytest.mark.parametrize("case", CASES)
def test_beams_equal_transformers(case: str, ranks: list[dict[str, Any]]) -> None:
    """Texts of one length, which no penalty ranks; under ZeRO-3 each rank searches for its own prompts."""
    assert all(rank[case]["beams"] == rank[case]["expected beams"] for rank in ranks)
    assert any(
        rank[case]["beams"] != [text[:5] for text in rank[case]["texts"][:9]] for rank in ranks
    )  # of a beam of 1


@pytest.mark.parametrize("case", ["tp2", "tp2 sequence parallel"])
def test_drawn_texts_do_not_depend_on_tp(case: str, ranks: list[dict[str, Any]]) -> None:
    a, b = (rank[case]["drawn"] for rank in ranks)
    assert a == b == ranks[0]["drawn on one rank"]


def test_training_goes_on_as_if_nothing_had_been_sampled(ranks: list[dict[str, Any]]) -> None:
    assert all(rank["curve after sampling"] == rank["curve"] for rank in ranks)


def test_an_error_on_one_rank_ends_all_of_them(ranks: list[dict[str, Any]]) -> None:
    """Under ZeRO-3 the others would wait for ever for that rank's part of the weights."""
    assert [rank["refused"] for rank in ranks] == [
        "another rank failed while sampling or scoring: its message gives the reason",
        "prompt 0 has 65 tokens: give 1 to n_ctx=64",
    ]


# ---- what runs on the ranks


def measure(seed: int) -> dict[str, Any]:
    out: dict[str, Any] = {}
    prompts = random_texts(LENGTHS, CFG.vocab_size, seed)
    with run.layout() as mesh:
        one = GPT(CFG, mesh)
        initialise(one, CFG, seed)
        hf = transformers_model(one)
        texts = [greedy(hf, prompt, NEW) for prompt in prompts]
        eot = texts[-1][3]  # some texts end early
        texts = [text[: text.index(eot) + 1] if eot in text else text for text in texts]
        beams = [search(hf, prompt) for prompt in prompts]
        expected = list(
            zip(prompts, texts, beams, [log_p(hf, *pair) for pair in zip(prompts, texts, strict=True)], strict=True)
        )
        pairs = [(prompts[i], text[:n]) for i in (9, 20, 30) for n, text in zip((12, 7, 3, 1), texts, strict=False)]
        choices = [(*pair, [], log_p(hf, *pair)) for pair in pairs]
        long = random_texts([60, 64, 70], CFG.vocab_size, seed)
        beyond = [(prompt, last_window(hf, prompt, n)) for prompt, n in zip(long, [8, 5, 3], strict=True)]
        out["drawn on one rank"] = sample(one, prompts, Sampling(), max_new_tokens=NEW)
        config = run.config(zero=3, model=MODEL)
        engine = run.build(config, mesh, seed)
        first = run.curve(engine, range(2))
        engine = run.build(config, mesh, seed)
        split = ("zero3", [expected[:22], expected[22:]], [beyond[:1], beyond[1:]])
        for case, parts, longer in (split, (CASES[-1], [expected, []], [beyond, []])):
            own = choices if parts[mesh.dp_rank] else []
            out[case] = compare(engine.module, parts[mesh.dp_rank], own, eot, longer[mesh.dp_rank])
        with pytest.raises(UserError) as refused:
            sample(engine.module, [[1] * (1 + 64 * mesh.dp_rank)], Sampling(), max_new_tokens=NEW)
        out["refused"] = str(refused.value)
        out["curve after sampling"], out["curve"] = run.curve(engine, range(2)), first
    with run.layout(tp=2) as mesh:
        for case, parallel in (("tp2", False), ("tp2 sequence parallel", True)):
            model = GPT(CFG, mesh, sequence_parallel=parallel)
            initialise(model, CFG, seed)
            out[case] = compare(model, expected, choices, eot, beyond)
            out[case]["drawn"] = sample(model, prompts, Sampling(), max_new_tokens=NEW)
    return out


def transformers_model(model: GPT) -> GPT2LMHeadModel:
    values = {k: v for k, v in hf_config(CFG).items() if k not in ("model_type", "architectures")}
    hf = GPT2LMHeadModel(GPT2Config(**values)).eval()
    state = {n: x[: CFG.vocab_size] if n == "wte.weight" else x for n, x in model.state_dict().items()}
    missing, unexpected = hf.load_state_dict(to_hf(state, CFG), strict=False)
    assert missing == ["lm_head.weight"] and not unexpected
    return hf


def search(hf: GPT2LMHeadModel, prompt: list[int]) -> list[int]:
    """transformers' own beam of 4, 5 tokens long, of one prompt alone."""
    ids = torch.tensor([prompt])
    how: dict[str, Any] = {"num_beams": 4, "early_stopping": "never", "do_sample": False, "eos_token_id": None}
    out = hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, pad_token_id=0, **how)
    return out[0, len(prompt) :].tolist()


def last_window(hf: GPT2LMHeadModel, prompt: list[int], n: int) -> list[int]:
    """The likeliest token after the last n_ctx ones, n times."""
    ids = list(prompt)
    for _ in range(n):
        ids += greedy(hf, ids[-CFG.n_ctx :], 1)
    return ids[len(prompt) :]


def compare(
    model: Any, expected: list[Any], choices: list[Any], eot: int, longer: list[tuple[list[int], list[int]]]
) -> dict[str, Any]:
    prompts = [prompt for prompt, *_ in expected]
    texts = sample(model, prompts, Sampling(0.0), max_new_tokens=NEW, eot=eot, batch_size=8)
    pairs: list[Pair] = [(prompt, text) for prompt, text, *_ in [*expected, *choices]]
    scores: list[Scores] = score(model, pairs, batch_size=8)
    results = [result for *_, result in [*expected, *choices]]
    errors = [(got.log_p - log_p).abs().max().item() for got, (log_p, _) in zip(scores, results, strict=True)]
    limits = [len(text) for _, text in longer]
    return {
        "beyond": sample(model, [prompt for prompt, _ in longer], Sampling(0.0), max_new_tokens=limits, slide=1),
        "expected beyond": [text for _, text in longer],
        "texts": texts,
        "expected": [text for _, text, *_ in expected],
        "beams": [h.new for h in beam_search(model, prompts[:9], Beam(), max_new_tokens=5, batch_size=16)],
        "expected beams": [beam for _, _, beam, _ in expected[:9]],
        "score_error": max(errors, default=0.0),
        "greedy_equal": all(torch.equal(s.greedy, is_best) for s, (_, is_best) in zip(scores, results, strict=True)),
    }
