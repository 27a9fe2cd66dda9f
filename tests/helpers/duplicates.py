"""Random texts, their near-duplicates, and plain, slow answers to what the fast code says of them."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Sequence
from itertools import combinations
from math import erfc, sqrt
from pathlib import Path
from typing import Any

import regex

from data_pipeline.corpus.document import Document
from data_pipeline.prepare.dedup.keys import write_keys
from data_pipeline.prepare.recipe_config import DedupConfig

CHANCE = 1e-6
"""Of a false alarm, for each test that asks chance."""


def vocabulary(rng: random.Random, n: int = 3000) -> list[str]:
    return ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(n)]


def random_text(rng: random.Random, words: Sequence[str], n: int) -> str:
    """n words, some much more common than others."""
    return " ".join(words[int(len(words) * rng.random() ** 3)] for _ in range(n))


def edited(rng: random.Random, text: str, words: Sequence[str], share: float) -> str:
    """With a share of its words replaced."""
    return " ".join(rng.choice(words) if rng.random() < share else word for word in text.split())


def loose_words(text: str) -> list[str]:
    """Words as the MinHash reads them, by regular expressions over the whole text."""
    text = "".join(map(str.lower, regex.sub(r"\p{Cf}", "", text)))  # letter by letter: a last sigma is no other letter
    text = unicodedata.normalize("NFC", regex.sub(r"\p{Mn}", "", unicodedata.normalize("NFD", text)))
    return regex.findall(r"[\p{L}\p{M}\p{N}]+", regex.sub(r"\p{Nd}+", "0", text))


def ngrams(text: str, n: int) -> set[tuple[str, ...]]:
    words = loose_words(text)
    return {tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))} if words else set()


def jaccard(a: set[Any], b: set[Any]) -> float:
    return len(a & b) / len(a | b) if a or b else 0.0


def s_curve(similarity: float, bands: int = 14, rows: int = 8) -> float:
    return 1 - (1 - similarity**rows) ** bands


def surprise(count: int, chances: Sequence[float]) -> float:
    """How unlikely it is that so many of independent events happened, or a number as far off (normal approximation)."""
    spread = sqrt(sum(p * (1 - p) for p in chances))
    return erfc(max(0.0, abs(count - sum(chances)) - 0.5) / spread / sqrt(2))


def write_parts(folder: Path, docs: Sequence[Document], cfg: DedupConfig, sizes: Sequence[int]) -> Path:
    """Keys in parts of these sizes, the rest in a last one."""
    start = 0
    for part, size in enumerate([*sizes, len(docs) - sum(sizes)]):
        write_keys(folder / f"00000-{part:04d}.safetensors", docs[start : start + size], cfg)
        start += size
    return folder


class Sets:
    """Union-find of the textbook."""

    def __init__(self, n: int) -> None:
        self.parent = list(range(n))

    def root(self, i: int) -> int:
        while self.parent[i] != i:
            i = self.parent[i]
        return i

    def join_all(self, members: Sequence[int]) -> None:
        for a, b in combinations(members, 2):
            self.parent[self.root(a)] = self.root(b)

    def groups(self) -> list[list[int]]:
        groups: dict[int, list[int]] = {}
        for i in range(len(self.parent)):
            groups.setdefault(self.root(i), []).append(i)
        return list(groups.values())
