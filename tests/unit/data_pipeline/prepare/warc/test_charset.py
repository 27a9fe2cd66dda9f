"""Bytes of pages to text: declared, undeclared, declared wrongly, and damaged."""

from __future__ import annotations

from random import Random

import pytest

from data_pipeline.prepare.warc.charset import decode
from tests.helpers.seeds import seeded

JAPANESE = "これは日本語の文章です。テストのために十分な長さが必要です。①②"
FRENCH = "Le garçon a mangé « des pâtes » à l’école, où l’été est doux – voilà."
RUSSIAN = "Привет, как дела? Это русский текст для проверки."
KOREAN = "한국어 문장입니다. 오늘은 날씨가 좋습니다."
CHINESE = "中文文本测试,这是一个足够长的句子。"
WRITTEN = {
    "utf-8": (JAPANESE + FRENCH, "utf-8"),
    "Shift_JIS": (JAPANESE, "cp932"),
    "euc-jp": (JAPANESE.rstrip("①②"), "euc_jp"),
    "iso-2022-jp": (JAPANESE.rstrip("①②"), "iso2022_jp"),
    "ISO-8859-1": (FRENCH, "cp1252"),
    "windows-1252": (FRENCH, "cp1252"),
    "windows-1251": (RUSSIAN, "cp1251"),
    "koi8-r": (RUSSIAN, "koi8_r"),
    "euc-kr": (KOREAN, "cp949"),
    "gb2312": (CHINESE, "gbk"),
    "big5": ("這是一個繁體中文的句子。", "big5"),
}


@pytest.mark.parametrize("label", WRITTEN)
def test_a_page_is_read_as_its_header_or_its_meta_tag_says(label: str) -> None:
    text, codec = WRITTEN[label]
    page = f'<html><head><meta charset="{label}"></head><body>{text}</body></html>'
    assert decode(page.encode(codec), None) == page
    bare = f"<p>{text}</p>"
    assert decode(bare.encode(codec), label) == bare


@pytest.mark.parametrize("label", ["windows-1252", "utf-8", "windows-1251", "Shift_JIS"])
@pytest.mark.parametrize("wrong", ["utf-8", "utf-16", "no-such-charset", "utf-7", "unicode_escape", "rot13", "", "\0"])
def test_a_header_that_is_wrong_costs_nothing(label: str, wrong: str) -> None:
    text, codec = WRITTEN[label]
    page = f"<p>{text * 5}</p>"
    assert decode(page.encode(codec), wrong) == page


def test_utf_8_that_calls_itself_latin_is_utf_8() -> None:
    page = f'<meta charset="iso-8859-1"><p>{FRENCH}'
    assert decode(page.encode(), "ISO-8859-1") == page


@pytest.mark.parametrize("codec", ["utf-16", "utf-8-sig"])
def test_a_byte_order_mark_outweighs_the_header(codec: str) -> None:
    assert decode(JAPANESE.encode(codec), "windows-1252") == JAPANESE


@pytest.mark.parametrize("codec", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("declared", [None, "utf-16", "utf-8"])
def test_utf_16_shows_without_a_mark(codec: str, declared: str | None) -> None:
    page = f"<html><head><title>A page</title></head><body>{FRENCH}</body></html>"
    assert decode(page.encode(codec), declared) == page


def test_invalid_bytes_in_utf_8_cost_only_themselves() -> None:
    page = f"<p>{FRENCH}</p>".encode()
    assert decode(page + b"\xff\xc3", "utf-8") == f"<p>{FRENCH}</p>\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}"


def test_zeros_that_fill_a_page_up_do_not_show() -> None:
    page = f"<html><body><p>{'A line of plain text. ' * 9}</p></body></html>"
    for data in (page.encode() + bytes(len(page)), bytes(3000) + page.encode(), page.encode().replace(b". ", b".\0 ")):
        assert decode(data, None) == page and decode(data, "utf-8") == page
    french = page.replace("plain", "français")
    assert decode(french.encode("cp1252") + bytes(9000), None) == french
    assert decode(french.encode("utf-16-le") + bytes(9000), None) == french


def test_ascii_and_nothing() -> None:
    assert decode(b"", None) == "" and decode(b"<p>plain", "shift_jis") == "<p>plain"


def test_any_bytes_give_text_that_utf_8_can_hold() -> None:
    seed = seeded()
    rng = Random(seed)
    for _ in range(300):
        data = rng.randbytes(rng.randrange(200))
        for declared in (None, "utf-16", rng.choice(list(WRITTEN)), "utf-8", "x-user-defined", "hz-gb-2312"):
            text = decode(data, declared)
            assert text.encode().decode() == text, (seed, data, declared)
