"""Small vocabularies and random conversations, for tests of examples."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from data_pipeline.tokenizer.tokenizer import Tokenizer, train_bpe

SPELLED = (
    "<|endoftext|>",
    "<|user_start|>",
    "<|assistant_end|>",
    "\n\nAssistant: ",
    "\n\nHuman:",
    "<|im_end|>",
)
"""Texts by which a user may try to write another turn."""
_WORDS = ("hello", "the cat", "naïve", "日本語", "🙂", "42", "<", "|>", "a b", "\ttab", "newline\nhere", "Human:")


def small_vocabulary() -> Tokenizer:
    """290 byte-level tokens with some merges, and <|endoftext|>."""
    return train_bpe([" hello the cat user assistant end start text Human Assistant"] * 9, 290)


def random_text(rng: random.Random, *, spelled: bool = True) -> str:
    """A few words, now and then with a text that looks like a special token; it neither begins nor ends with space."""
    words = [rng.choice((*_WORDS, *(SPELLED if spelled else ()))) for _ in range(rng.randint(1, 8))]
    return (rng.choice(("", " ", "  ")).join(words)).strip() or "x"


def random_messages(rng: random.Random, turns: int = 4, **how: bool) -> list[dict[str, str]]:
    """A conversation with an answer: perhaps a system turn, then a user's and the assistant's in turn."""
    roles = ["user", "assistant"] * rng.randint(1, turns)
    roles = ["system", *roles] if rng.random() < 0.3 else roles
    return [{"role": role, "content": random_text(rng, **how)} for role in roles]


def write_lines(path: Path, records: list[Any]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path
