"""Random comparisons, for tests of what learns from them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from data_pipeline.examples.read import Preference

VOWELS, LETTERS = "aeiou", "abcdefghijklmnopqrstuvwxyzAEIOU"


def random_preferences(
    rng: np.random.Generator, n: int, *, vocab_size: int, longest: int, ks: tuple[int, int] = (2, 5), ties: bool = True
) -> list[Preference]:
    """`n` comparisons of ks[0] to ks[1] answers of all lengths, at most `longest` ids with the prompt."""
    out = []
    for _ in range(n):
        k, prompt = rng.integers(ks[0], ks[1] + 1), rng.integers(0, vocab_size, rng.integers(1, longest // 2))
        lengths = rng.integers(1, longest - len(prompt) + 1, k)
        answers = tuple(rng.integers(0, vocab_size, length).astype(np.int32) for length in lengths)
        ranks = rng.integers(0, k, k) if ties else rng.permutation(k)
        out.append(
            Preference(prompt.astype(np.int32), answers, np.unique(ranks, return_inverse=True)[1].astype(np.int32))
        )
    return out


def shuffled(rng: np.random.Generator, item: Preference) -> Preference:
    """The same comparison, its answers in another order."""
    order = rng.permutation(len(item.answers))
    return Preference(item.prompt, tuple(item.answers[i] for i in order), item.ranks[order])


def vowels(text: str) -> float:
    """The share of lower-case vowels."""
    return sum(text.count(vowel) for vowel in VOWELS) / len(text)


def vowel_records(rng: np.random.Generator, n: int, k: int = 4, length: int = 16) -> list[dict[str, object]]:
    """Records of the form ranks: answers of random letters, of which those with more lower-case vowels are better."""
    out: list[dict[str, object]] = []
    for _ in range(n):
        prompt = "".join(rng.choice([*LETTERS], 2))
        answers = ["".join(rng.choice([*LETTERS], length)) for _ in range(k)]
        shares = sorted({vowels(answer) for answer in answers}, reverse=True)
        if len(shares) > 1:
            ranks = [1 + shares.index(vowels(answer)) for answer in answers]
            out.append({"prompt": prompt, "responses": answers, "ranks": ranks})
    return out


def write_records(path: Path, records: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path
