"""Masks on personal data, against datatrove's formatter."""

from __future__ import annotations

from random import Random

import pytest
from datatrove.pipeline.formatters.pii import PIIFormatter

from data_pipeline.corpus.document import Document
from data_pipeline.prepare.recipe_config import PiiConfig
from data_pipeline.prepare.rules.pii import FICTION, LONGEST_LOCAL, Pii
from tests.helpers.seeds import seeded


def masked(text: str, name: str = "d", **config: bool) -> str:
    doc = Document(text=text, id=name)
    assert Pii(PiiConfig(**config)).apply([doc]) == [None]
    return doc.text


def one_for_all() -> tuple[Pii, PIIFormatter]:
    """Both with one replacement of each kind, so that their texts can be compared."""
    step = Pii(PiiConfig())
    step.masks = [(find, (other,)) for (find, _), other in zip(step.masks, ("<mail>", "<ip>"), strict=True)]
    return step, PIIFormatter(email_replacement="<mail>", ip_replacement="<ip>")


def test_what_is_masked_is_what_datatrove_masks() -> None:
    seed = seeded()
    rng = Random(seed)
    step, peer = one_for_all()
    atoms = "a b-c d.e . .. @ [ ] - _ 8.8.8.8 10.0.0.1 1.2.3 256 01.02.03.04 x.org é : + ' 25 5.6.7.8.9 \n \t"
    found = 0
    for _ in range(20_000):
        text = "".join(rng.choices(atoms.split(" "), k=rng.randrange(1, 9)))
        doc = Document(text=text, id="x")
        step.apply([doc])
        expected = peer.format(text)
        found += expected != text
        assert doc.text == expected, f"seed {seed}: {text!r}"
    assert found > 500


def test_replacements_depend_on_document_and_position_alone() -> None:
    """Replacements are datatrove's, and depend on the document and the position alone."""
    peer = PIIFormatter()
    text = "jane@corp.example, joe@corp.example at 8.8.8.8 or 9.9.9.9, not at 10.0.0.1 or 127.0.0.1. " * 20
    out = masked(text)
    assert out == masked(text) != masked(text, "another document")
    assert "corp.example" not in out and "8.8.8.8" not in out and out.count("10.0.0.1") == 20
    for others in (peer.emails_replacer.replacements, peer.ip_replacer.replacements):
        assert all(other in out for other in others)


def test_each_mask_has_its_switch() -> None:
    text = "jane@corp.example 8.8.8.8 (212) 555-1234"
    assert masked(text, email=False, ip=False) == text
    assert masked(text, email=False).startswith("jane@corp.example ") and "8.8.8.8" not in masked(text, email=False)
    assert "212" in masked(text) and "212" not in masked(text, phone=True)


@pytest.mark.parametrize(
    "phone", ["212-555-1234", "(212) 555-1234", "212.555.1234", "1-212-555-1234", "+1 212 555 1234", "+44 20 7946 0958",
              "+49 (30) 1234567", "+33 1 23 45 67 89"],
)  # fmt: skip
def test_a_telephone_number_is_masked(phone: str) -> None:
    out = masked(f"Call {phone}, or write.", phone=True)
    assert out.removeprefix("Call ").removesuffix(", or write.") in FICTION


@pytest.mark.parametrize(
    "text", ["2019-03-2020", "978-0-306-40615-7", "1,234,567", "12.345.678", "1914-1918", "+5", "555-1234", "5 + 3 = 8",
             "112-555-1234", "version 3.14.159.2653", "2125551234567", "x+1 and +12 34"],
)  # fmt: skip
def test_other_numbers_stay(text: str) -> None:
    assert masked(text, phone=True, ip=False) == text


def test_a_long_word_before_an_at_is_cut_to_its_last_characters() -> None:
    text = "a-" * 100_000 + "b@c.org"
    out = masked(text)
    assert "b@c.org" not in out and len(text) - LONGEST_LOCAL - 10 < len(out) <= len(text) + 20
    assert masked("@" * 100_000 + "a.b" * 10_000) == "@" * 100_000 + "a.b" * 10_000
