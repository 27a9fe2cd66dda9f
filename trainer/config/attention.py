"""Attention patterns: the one definition of the tokens that a token sees. Standard library only.

`Pattern.sees` is the definition; masks, FlexAttention, FLOPs and the plan all ask it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any


@dataclass(frozen=True)
class Pattern:
    """Attention of one kind (a letter of ModelConfig.attention) with its numbers; hashable."""

    kind: str
    band: int
    stride: int
    summary: int

    def sees(self, q: Any, k: Any) -> Any:
        """True if the token at position `q` sees the one at `k`: ints, or tensors that broadcast, from 0 in one text.

        Band: arXiv 2005.14165, section 2.1. Strided and fixed: arXiv 1904.10509, section 4, both of its sets in one
        head; the strided one's band holds `stride` tokens, itself included, as in its released code.
        """
        past = q >= k
        if self.kind == "B":
            return past & (q - k < self.band)
        if self.kind == "S":
            return past & ((q - k < self.stride) | ((q - k) % self.stride == 0))
        if self.kind == "F":
            own = q // self.stride == k // self.stride
            return past & (own | (k % self.stride >= self.stride - self.summary))
        return past

    def visible_pairs(self, n: int) -> int:
        """The number of (query, key) pairs in a text of `n` tokens; dense: n (n + 1) / 2."""
        return _visible_pairs(self, n)

    def sees_all(self, n: int) -> bool:
        """True if every token of a text of `n` tokens sees all of its past."""
        return self.visible_pairs(n) == n * (n + 1) // 2

    def sees_block(self, q: int, k: int, size: int) -> bool:
        """True if a token of query block `q` sees one of key block `k` <= `q`, blocks of `size` tokens.

        The first query with each key, and each query with the first key, make every distance between the two blocks;
        and a fixed pattern's own part reaches into a later block at its first query or not at all.
        """
        query, key = q * size, k * size
        return any(self.sees(query, key + i) or self.sees(query + i, key) for i in range(size))


DENSE = Pattern("D", 0, 0, 0)


@lru_cache(maxsize=4096)
def _visible_pairs(pattern: Pattern, n: int) -> int:
    if pattern.kind == "F":  # all of the own part up to the query, and the summary of each part before it
        stride = pattern.stride
        summary = sum(pattern.sees(stride, k) for k in range(stride))
        return sum(q // stride * summary + q % stride + 1 for q in range(n))
    return sum((n - distance) * pattern.sees(distance, 0) for distance in range(n))
