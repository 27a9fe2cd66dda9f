"""A sample's text while its tokens come: its pieces are the whole, and a stop text is never shown."""

from __future__ import annotations

import random

import pytest

from data_pipeline.tokenizer.tokenizer import Tokenizer
from tests.helpers.seeds import seeded
from trainer.inference.growing_text import GrowingText

TEXT = "Züge – 日本語 🙂🙂 end.\n\nEN END\n\n\nENDE"


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return Tokenizer.load("gpt2")


def bytes_of(gpt2: Tokenizer, text: str) -> list[int]:
    """One token for each byte: most characters come in several tokens."""
    return [gpt2.encode(chr(b))[0] if b < 128 else BYTE[b] for b in text.encode()]


BYTE = {b: i for i, b in enumerate([*range(33, 127), *range(161, 173), *range(174, 256)])} | {
    b: 188 + i for i, b in enumerate([*range(0, 33), *range(127, 161), 173])
}


@pytest.mark.parametrize("stops", [[], ["END\n"], ["\n\n\n", "EN EN"], ["🙂 ", "absent"], ["本", "日本語 🙂🙂 end"]])
@pytest.mark.parametrize("prompt", ["", "Once END\n – "])
def test_pieces_are_the_text_up_to_the_first_stop(prompt: str, stops: list[str], gpt2: Tokenizer) -> None:
    """Also with a stop text in the prompt, over several tokens, or inside another one that would begin earlier."""
    before, ids = gpt2.encode(prompt), bytes_of(gpt2, TEXT)
    assert gpt2.decode(ids) == TEXT
    growing, pieces = GrowingText(gpt2.decode, before, stops), []
    for n in range(1, len(ids) + 1):
        stopped = growing.update(ids[:n])
        pieces.append(growing.certain())
        assert "\ufffd" not in pieces[-1]
        if stopped:
            break
    ends = [TEXT.find(stop) + len(stop) for stop in stops if stop in TEXT]
    first = min(ends, default=len(TEXT))  # the first to be complete
    cut = next((first - len(stop) for stop in stops if TEXT[:first].endswith(stop)), first)
    assert growing.text == prompt + TEXT[:cut] == "".join([*pieces, growing.rest()])
    assert stopped == bool(ends)


def test_pieces_of_random_bytes_are_what_is_decoded_at_once(gpt2: Tokenizer) -> None:
    draw = random.Random(seeded())
    for _ in range(50):
        ids = [draw.randrange(256) for _ in range(60)]
        growing, pieces = GrowingText(gpt2.decode, [], []), []
        for n in range(1, len(ids) + 1):
            growing.update(ids[:n])
            pieces.append(growing.certain())
        assert "".join([*pieces, growing.rest()]) == gpt2.decode(ids)
