"""Random models with a real vocabulary, and random documents in the forms that evaluation tasks have."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

from data_pipeline.tokenizer.tokenizer import Tokenizer
from tests.helpers.hf_models import hf_model
from trainer.config.hf import ImportHfConfig
from trainer.config.model import Norm
from trainer.export_hf import tokenizer_config
from trainer.hf.folder import HfFolder
from trainer.import_hf import import_hf

WORDS = (
    "the a stone river of in to guardian angel walks, night. cars might well have some backup! she looked down at "
    "him; feeling stunned? signs like this are not for me (or you) when nobody's there 1984 7:30 café naïve under"
).split()
Row = dict[str, Any]


def random_checkpoint(folder: Path, n_ctx: int, seed: int, scale: float = 1.0) -> tuple[Path, Path]:
    """A random GPT-2 with GPT-2's vocabulary: the folder that transformers wrote, and our checkpoint of it.

    `scale` multiplies the embeddings: with 10 a model is sure of itself, and often says its last token again.
    """
    torch.manual_seed(seed)
    theirs, ours, tokenizer = folder / "hf", folder / "checkpoint", Tokenizer.load("gpt2")
    model = hf_model(Norm.pre, n_positions=n_ctx, n_embd=32, vocab_size=tokenizer.vocab_size)
    with torch.no_grad():
        model.transformer.wte.weight.mul_(scale)
    model.save_pretrained(theirs)
    tokenizer.save(theirs)
    settings = tokenizer_config(HfFolder(theirs).cfg, tokenizer)
    (theirs / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    import_hf(ImportHfConfig(source=str(theirs), out=str(ours)))
    return theirs, ours


class Documents:
    """Documents that are a function of a seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def text(self, low: int, high: int) -> str:
        """A text of low to high words, some of which two blanks part."""
        words = self._random.choices(WORDS, k=self._random.randint(low, high))
        return "".join(word + self._random.choice((" ", " ", " ", "  ")) for word in words).strip()

    def lambada(self, n: int) -> list[Row]:
        return [{"text": f"{self.text(20, 160)} {self._random.choice(WORDS[:9])}"} for _ in range(n)]

    def piqa(self, n: int) -> list[Row]:
        two = ("sol1", "sol2")
        return [
            {"goal": self.text(4, 12), **{k: self.text(5, 30) for k in two}, "label": self._random.randrange(2)}
            for _ in range(n)
        ]

    def copa(self, n: int) -> list[Row]:
        return [
            {
                "premise": self.text(4, 9).rstrip(".") + ".",
                "choice1": self.text(3, 8),
                "choice2": self.text(3, 8),
                "question": self._random.choice(("cause", "effect")),
                "label": self._random.randrange(2),
                "idx": i,
            }
            for i in range(n)
        ]

    def blimp(self, n: int) -> list[Row]:
        return [{"sentence_good": self.text(4, 9), "sentence_bad": self.text(4, 9)} for _ in range(n)]

    def wikitext(self, n: int) -> list[Row]:
        return [
            {"page": f" = {self.text(1, 3)} = \n \n {self.text(100, 400)} @-@ {self.text(9, 99)} \n"} for _ in range(n)
        ]

    def nq_open(self, n: int) -> list[Row]:
        return [{"question": self.text(5, 9), "answer": [self.text(1, 2), self.text(1, 3)]} for _ in range(n)]


def write_rows(path: Path, rows: list[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
