"""A document and the reason that a record became none: the same two records from every reader to the last step.

`metadata` holds, where known,

    url, date     origin and date (ISO 8601)
    source        name of the corpus
    path          file, file:line or file:position, relative to the corpus
    html          bytes of the page, until the extractor replaces them by text
    charset       from the HTTP header
    tokens        number of tokens of the text
    score         of the quality model, in 0..1
    language, language_score
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Document:
    text: str
    id: str
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Dropped:
    """A piece of the input that became no document. `path` is file or file:line, relative to the corpus."""

    reason: str
    path: str


def read_document(text: str, id: Any, source: str, path: str, url: Any = None, date: Any = None) -> Document:
    """A document as a reader makes it; without a usable `id` its `path` identifies it, other types are left out.

    The text has no byte order mark, and each of its lines ends with \\n.
    """
    text = text.removeprefix("\ufeff")
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    known = {"url": url, "date": date}
    metadata = {key: value for key, value in known.items() if value and isinstance(value, str)}
    name = str(id) if isinstance(id, str | int) else path
    return Document(text, name, metadata | {"source": source, "path": path})


def field_of(body: Any, key: str) -> Any:
    """The value of a record's field; `a.b` is the field "a.b", or else the field "b" of the object in "a"; or None."""
    if not isinstance(body, dict):
        return None
    if key in body or "." not in key:
        return body.get(key)
    first, _, rest = key.partition(".")
    return field_of(body.get(first), rest)
