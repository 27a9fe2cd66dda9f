"""The text of a page's bytes, without navigation and the like, its encoding repaired.

`fast` and `best` are factories for sandbox.py: each loads what it needs and returns a function of the page's bytes and
the charset of its HTTP header ("" = none). No document changes the text of another.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from data_pipeline.prepare.warc.charset import decode

TextOf = Callable[[bytes, str], str]

CAPTIONS = ["div[class*=caption]", "p[class*=caption]", "span[class*=caption]"]  # of pictures: not in the text's flow
OUT_OF_MEMORY = "(Error 2)"  # lexbor's LXB_STATUS_ERROR_MEMORY_ALLOCATION, in resiliparse's message

SUSPECT = re.compile(
    r"""
    [^\t\n -%'-~]                       # not plain ASCII, or &; and then
    (?: [\x80-\u03ab\u0400-\u042f\u0490\u0491\u2000-\u2bff\uf8ff\ufb01\ufb02\ufffd]  # a second one of mojibake
      | (?<= [\x00-\x1f\x7f-\x9f\u2028\u2029\u206a-\u206f\ufeff\ufff9-\ufffc\ud800-\udfff] )
      | (?<= [ŒœÂÃ] )                   # mojibake that the next, ASCII, character tells
      | (?<= & ) \#? [0-9A-Za-z]{1,24};
    )""",
    re.VERBOSE,
)
"""In every line that ftfy could change: a line without a match stays as it is."""


PLAIN = "plain text"  # instead of a charset, which has no blank: the bytes are text (UTF-8), which is only repaired


def fast() -> TextOf:
    """resiliparse's main content."""
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.html import HTMLParserException

    def content(html: str) -> str:
        try:
            return extract_plain_text(
                html, main_content=True, alt_texts=False, comments=False, post_meta=False, skip_elements=CAPTIONS
            )
        except HTMLParserException as e:
            if OUT_OF_MEMORY in str(e):
                raise MemoryError from None
            raise

    return _repaired(content)


def best() -> TextOf:
    """trafilatura, favouring precision as datatrove does; without its removal of what earlier pages had."""
    from lxml.etree import ErrorTypes
    from trafilatura import extract
    from trafilatura.utils import HTML_PARSER

    def content(html: str) -> str:
        text: str | None = extract(html, favor_precision=True, include_comments=False)
        if not text and any(error.type == ErrorTypes.ERR_NO_MEMORY for error in HTML_PARSER.error_log):
            raise MemoryError  # which trafilatura takes for a page without text
        return text or ""

    return _repaired(content)


def _repaired(content: Callable[[str], str]) -> TextOf:
    fixed = repairer()

    def text_of(html: bytes, charset: str) -> str:
        plain = charset == PLAIN
        return fixed(html.decode("utf-8", "surrogatepass") if plain else content(decode(html, charset or None)))

    return text_of


def repairer() -> Callable[[str], str]:
    """ftfy.fix_text with FineWeb's settings (datatrove's FTFYFormatter), and every line break made \\n.

    ftfy repairs one line after the other; here it gets only the lines that it could change.
    """
    from ftfy import TextFixerConfig, fix_text

    config = TextFixerConfig(
        fix_latin_ligatures=False, fix_character_width=False, uncurl_quotes=False, normalization=None, explain=False
    )
    after_markup = config._replace(unescape_html=False)  # ftfy's rule: after the first < entities are meant

    def fixed(text: str) -> str:
        done, end, markup = [], 0, text.find("<")
        while suspect := SUSPECT.search(text, end):
            start = text.rfind("\n", end, suspect.start()) + 1 or end
            done.append(text[end:start])
            end = text.find("\n", suspect.end()) + 1 or len(text)
            done.append(fix_text(text[start:end], after_markup if 0 <= markup < start else config))
        return "".join([*done, text[end:]]).strip()

    return fixed
