"""`python -m data_pipeline.examples preview`: examples as a model gets them, their labels in colour or brackets."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterable, Iterator
from itertools import groupby

import numpy as np

from data_pipeline.examples.examples_config import PreviewConfig
from data_pipeline.examples.read import COMPARISONS, Preference, form_at, read_examples, read_preferences
from data_pipeline.examples.rows import RowOrder
from data_pipeline.examples.templates import Example, Renderer
from data_pipeline.tokenizer.tokenizer import Tokenizer

COLOURED = "\x1b[2m", "\x1b[22m", "\x1b[32m", "\x1b[39m"  # around a special token, around labels
PLAIN = "⟨", "⟩", "[", "]"


def preview(cfg: PreviewConfig) -> None:
    """Print the first examples, then the counts of all, and what was dropped."""
    tokenizer = Tokenizer.load(cfg.tokenizer)
    print("\n".join(_preview(cfg, tokenizer, COLOURED if sys.stdout.isatty() else PLAIN)))


def _preview(cfg: PreviewConfig, tokenizer: Tokenizer, marks: tuple[str, str, str, str]) -> Iterator[str]:
    if form_at(cfg) in COMPARISONS:
        compared = read_preferences(cfg, tokenizer, cfg.n_ctx)
        for path, item in zip(compared.paths[: cfg.n], compared.items, strict=False):
            yield from _comparison(path, item, compared.renderer, marks)
        yield from compared.summary()
        return
    found = read_examples(cfg, tokenizer, cfg.n_ctx)
    for path, example in zip(found.paths[: cfg.n], found.items, strict=False):
        yield f"{path}: {len(example.ids)} tokens, {int(example.mask.sum())} of them labels"
        yield shown(example, found.renderer, marks) + "\n"
    yield from found.summary()
    order = RowOrder([len(example.ids) - 1 for example in found.items], rows_per_step=1, seed=0, n_ctx=cfg.n_ctx)
    yield f"examples: packed into {order.start(1):,} rows of n_ctx={cfg.n_ctx}, {order.fill(0):.1%} full"


def _comparison(path: str, item: Preference, renderer: Renderer, marks: tuple[str, str, str, str]) -> Iterator[str]:
    yield f"{path}: a prompt of {len(item.prompt)} tokens, {len(item.answers)} answers"
    yield shown(Example(item.prompt, np.zeros(len(item.prompt), bool)), renderer, marks)
    for rank, ids in zip(item.ranks.tolist(), item.answers, strict=True):
        yield f"rank {rank + 1}: {shown(Example(ids, np.ones(len(ids), bool)), renderer, marks)}"
    yield ""


def shown(example: Example, renderer: Renderer, marks: tuple[str, str, str, str]) -> str:
    """The text of an example with marks around special tokens and around labels; control characters are escaped."""
    names = {i: name for name, i in (renderer.tokenizer.special_ids | renderer.special).items()}
    special, special_end, label, label_end = marks

    def parts(ids: Iterable[int]) -> Iterator[str]:
        for in_text, run in groupby(ids, lambda i: i not in names):
            if in_text:
                yield _harmless(renderer.tokenizer.decode(list(run)))
            else:
                yield from (f"{special}{names[i]}{special_end}" for i in run)

    text = ""
    for learnt, pairs in groupby(zip(example.ids.tolist(), example.mask.tolist(), strict=True), lambda pair: pair[1]):
        run = "".join(parts(i for i, _ in pairs))
        text += f"{label}{run}{label_end}" if learnt else run
    return text


def _harmless(text: str) -> str:
    """The text without what could steer a terminal: control and format characters are written as escapes."""
    steers = {c for c in set(text) - {"\n", "\t"} if unicodedata.category(c)[0] == "C"}
    return text.translate({ord(c): ascii(c)[1:-1] for c in steers})
