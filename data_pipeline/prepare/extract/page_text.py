"""The text of a page's bytes, without navigation and the like, its encoding repaired.

`fast` and `best` are factories for sandbox.py: each loads what it needs and returns a function of the page's bytes and
the charset of its HTTP header ("" = none). No document changes the text of another.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from data_pipeline.prepare.warc.charset import decode

TextOf = Callable[[bytes, str], str]

CAPTIONS = ["div[class*=caption]", "p[class*=caption]", "span[class*=caption]"]  # of pictures: not in the text's flow
SHALLOW_LISTS = "body > ul, body > * > ul, body > * > * > ul"  # resiliparse takes them for the site's navigation
LINK_CHARS = 20  # a list of fewer characters a link is one of links
CELL, ITEM = re.compile(r"<t[dh][\s>]", re.IGNORECASE), re.compile(r"<li[\s>]", re.IGNORECASE)
PARSE_FAILED = "Failed to parse"  # resiliparse's message; HTML has no wrong syntax, so that only memory can lack
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
    """resiliparse's main content, and lists of text anywhere."""
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.html import HTMLParserException, HTMLTree

    def content(html: str) -> str:
        try:
            tree = HTMLTree.parse(html)
            for items in tree.body.query_selector_all(SHALLOW_LISTS) if tree.body else ():
                if _is_text(items):
                    _bury(items, tree)
            return extract_plain_text(
                tree, main_content=True, alt_texts=False, comments=False, post_meta=False, skip_elements=CAPTIONS
            )
        except HTMLParserException as e:
            if OUT_OF_MEMORY in str(e) or PARSE_FAILED in str(e):
                raise MemoryError from None
            raise

    return _repaired(content)


def _is_text(items: Any) -> bool:
    """True if links are at most half of the text of a list, which lies in no menu."""
    if items.closest("nav, header, footer, aside"):
        return False
    links, text = items.query_selector_all("a"), items.text
    if len(text) < LINK_CHARS * len(links):
        return False
    return 2 * sum(len(" ".join(link.text.split())) for link in links) <= len(" ".join(text.split()))


def _bury(items: Any, tree: Any) -> None:
    """Put a list three levels deeper, where resiliparse judges it by what it holds."""
    for _ in range(3):
        wrapper = tree.create_element("div")
        items.replace_with(wrapper)
        wrapper.append_child(items)


def best() -> TextOf:
    """trafilatura, favouring precision as datatrove does; without its removal of what earlier pages had."""
    from lxml.etree import ErrorTypes
    from trafilatura import extract
    from trafilatura.utils import HTML_PARSER, load_html

    def content(html: str) -> str:
        cell = CELL.search(html)
        page = _lists_in_cells(load_html(html)) if cell and ITEM.search(html, cell.end()) else None
        text: str | None = extract(html if page is None else page, favor_precision=True, include_comments=False)
        if not text and any(error.type == ErrorTypes.ERR_NO_MEMORY for error in HTML_PARSER.error_log):
            raise MemoryError  # which trafilatura takes for a page without text
        return text or ""

    return _repaired(content)


def _lists_in_cells(page: Any) -> Any:
    """The page with the lists of text that are in cells of a table made paragraphs: trafilatura drops such lists."""
    for items in [] if page is None else page.xpath("//td//ul | //td//ol | //th//ul | //th//ol"):
        links = sum(len(" ".join(link.text_content().split())) for link in items.iter("a"))
        if 2 * links <= len(" ".join(items.text_content().split())):
            items.tag = "div"
            for item in items.iter("li"):
                item.tag = "p"
    return page


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
