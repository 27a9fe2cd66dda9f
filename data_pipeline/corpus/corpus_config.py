"""Settings of a corpus: its format, its files and the fields of its records. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from conf.errors import MISSING, UserError


class CorpusFormat(Enum):
    pydocs = "pydocs"
    text = "text"
    jsonl = "jsonl"
    parquet = "parquet"  # FineWeb's form
    books = "books"  # one document each: EPUB, and any other file as plain text
    warc = "warc"  # WARC, ARC and WET archives
    links = "links"  # Reddit's submissions; the pages they point to are the documents
    several = "several"  # corpora, each of its own format


@dataclass
class CorpusConfig:
    """The source of documents. `path` is a file, a folder (searched through), a glob or a URL; pydocs has none."""

    name: str = MISSING  # names the source in shards and reports
    format: CorpusFormat = MISSING
    path: str | None = None  # a file, a folder (searched through), a glob or a URL
    text_key: str = "text"  # jsonl, parquet: the field or column that holds the text; a.b is the field b of a
    id_key: str = "id"  # jsonl, parquet: what names the document; one without it is named file:line

    def __post_init__(self) -> None:
        if self.format is not CorpusFormat.pydocs and not self.path:
            raise UserError(
                f"corpus={self.name} reads {self.format.value} files: say where, corpus.path=FILE_OR_FOLDER"
            )
