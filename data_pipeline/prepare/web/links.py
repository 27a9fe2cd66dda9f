"""Reddit's submissions -> links that people voted for, as WebText chose its pages (Radford et al. 2019, section 2.1).

The input is Pushshift's dumps, RS_*: lines of JSON, plain or .gz, .bz2, .xz, .zst. Of the links to one page the one of
the best score stays; of those the oldest, of those the first. State: 16 bytes for each link that passes the rules, 45
while they are compared; the links themselves wait in a file.
"""

from __future__ import annotations

import io
import os
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np

from conf.errors import UserError
from data_pipeline.corpus.document import Document, Dropped
from data_pipeline.corpus.inputs import Input
from data_pipeline.corpus.lines import lines
from data_pipeline.corpus.report import Report
from data_pipeline.files import publish_json, rename
from data_pipeline.prepare.recipe_config import LinksConfig
from data_pipeline.prepare.step import Step
from data_pipeline.prepare.web.urls import Url, below, normalize

LINKS, KEYS, REPORT = "links.jsonl.zst", "keys.npy", "links.json"
WINDOW = 1 << 31  # bytes of memory that a .zst may take: Pushshift's do
MAX_LINE = 1 << 24  # bytes of a submission
REDDIT = ("reddit.com", "redd.it", "redditmedia.com", "redditstatic.com")
DUPLICATE = "another link to the same page"


@dataclass(frozen=True, slots=True)
class Link:
    """`score` and `date` (ISO 8601, UTC, to the second) are the submission's."""

    url: str
    score: int
    date: str
    subreddit: str | None = None


def links(files: Sequence[Input], cfg: LinksConfig, folder: Path | None = None) -> Iterator[Link | Dropped]:
    """Every line of the dumps as a link or as a reason: first the lines that the rules drop, then the links in order.

    Args:
        folder: of the file in which links wait, about 100 bytes for each before compression; None = the system's.

    Raises:
        UserError: links.until is no day.
    """
    import orjson
    import zstandard

    rules = _Rules(cfg)
    keys, scores, dates = array("Q"), array("i"), array("I")
    with tempfile.TemporaryFile(dir=folder) as waiting:
        packed = zstandard.ZstdCompressor(level=3).stream_writer(waiting, closefd=False)
        for file in files:
            for number, (line, _) in enumerate(lines(file, MAX_LINE, WINDOW), 1):
                item, label = rules.link(line) if isinstance(line, bytes) else line.reason, f"{file.name}:{number}"
                if isinstance(item, str):
                    yield Dropped(item, label)
                    continue
                link, key, seconds = item
                keys.append(key)
                scores.append(link.score)
                dates.append(seconds)
                packed.write(orjson.dumps((link.url, link.score, link.date, link.subreddit, label)) + b"\n")
        packed.close()
        kept = _best(np.asarray(keys), np.asarray(scores), np.asarray(dates))
        waiting.seek(0)
        reader = io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(waiting))
        for i, line in enumerate(reader):
            *values, label = orjson.loads(line)
            yield Link(*values) if kept[i] else Dropped(DUPLICATE, label)


def _best(keys: np.ndarray, scores: np.ndarray, dates: np.ndarray) -> np.ndarray:
    """Marks of the links [n] that stay, bool [n]: of each key the best score, then the oldest, then the first."""
    order = np.lexsort((dates, -scores, keys))  # stable
    first = np.ones(len(keys), bool)
    np.not_equal(keys[order[1:]], keys[order[:-1]], out=first[1:])
    kept = np.zeros(len(keys), bool)
    kept[order[first]] = True
    return kept


class _Rules:
    def __init__(self, cfg: LinksConfig) -> None:
        self.cfg = cfg
        self.until = end_of(cfg.until)
        self.hosts = frozenset(h.lower() for h in cfg.skip_hosts)
        self.reddit = frozenset(REDDIT)
        self.endings = tuple(e.lower() for e in cfg.skip_endings)

    def link(self, line: bytes) -> tuple[Link, int, int] | str:
        """(the link, its key, its second), or the reason why the line is none."""
        import orjson

        try:
            post = orjson.loads(line)
        except orjson.JSONDecodeError:
            return "not JSON" if line.strip() else "an empty line"
        fields = _fields(post)
        if fields is None:
            return "not a submission with a url, a score and a date"
        url, score, seconds = fields
        if score < self.cfg.min_score:
            return "a score below min_score"
        if self.until is not None and seconds >= self.until:
            return "submitted after links.until"
        if post.get("over_18") and not self.cfg.over_18:
            return "for adults"
        if post.get("is_self"):
            return "a text of its own, no link"
        target = normalize(url.replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))  # Reddit escapes them
        if target is None:
            return "not a web address"
        if reason := self.refusal(target):
            return reason
        subreddit = post.get("subreddit")
        date = datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")
        link = Link(str(target), score, date, subreddit if isinstance(subreddit, str) else None)
        return link, target.key, seconds

    def refusal(self, url: Url) -> str | None:
        if below(url.host, self.reddit):
            return "a link within Reddit"
        if below(url.host, self.hosts):
            return "a host of links.skip_hosts"
        if self.endings and url.path.lower().endswith(self.endings):
            return "an ending of links.skip_endings"
        return None


def _fields(post: Any) -> tuple[str, int, int] | None:
    if not isinstance(post, dict):
        return None
    url, score, date = post.get("url"), post.get("score"), post.get("created_utc")
    try:
        seconds = int(float(str(date)))  # a string in some dumps
    except (TypeError, ValueError, OverflowError):
        return None
    if not isinstance(url, str) or not isinstance(score, int) or not 0 <= seconds < 1 << 32 or abs(score) >= 1 << 31:
        return None
    return url, score, seconds


def end_of(day: str | None) -> float | None:
    """The second after a day, YYYY-MM-DD in UTC, or None without one; raises UserError for a text that is no day."""
    if day is None:
        return None
    try:
        return datetime.strptime(day, "%Y-%m-%d").replace(tzinfo=UTC).timestamp() + 86400
    except ValueError:
        raise UserError(f"links.until={day}: give a day as YYYY-MM-DD") from None


def write_links(files: Sequence[Input], cfg: LinksConfig, out: Path) -> Report:
    """Write the links, their keys (sorted, uint64 [n]) and last the counts into the folder `out`, each whole or not."""
    import orjson
    import zstandard

    out.mkdir(parents=True, exist_ok=True)
    report, keys = Report(), array("Q")
    with _staged(out / LINKS) as raw, zstandard.ZstdCompressor(level=10).stream_writer(raw, closefd=False) as packed:
        for item in links(files, cfg, out):
            if isinstance(item, Dropped):
                report.drop_record(item)
                continue
            report.count_documents(1)
            keys.append(key_of(item.url))
            packed.write(orjson.dumps(item) + b"\n")
    with _staged(out / KEYS) as raw:
        np.save(raw, np.sort(np.asarray(keys)))
    publish_json(out / REPORT, report.to_json())
    return report


@contextmanager
def _staged(path: Path) -> Iterator[IO[bytes]]:
    """A file that gets its name when it is whole and on the disk."""
    staging = path.with_name(f".{path.name}.tmp")
    with staging.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    rename(staging, path)


def read_links(path: Path) -> Iterator[Link]:
    """The links of a file; raises UserError if it is damaged."""
    import orjson

    info = Input(path, path.name, path.stat().st_size, 0)
    for line, _ in lines(info, MAX_LINE):
        try:
            yield Link(**orjson.loads(line if isinstance(line, bytes) else b""))
        except (orjson.JSONDecodeError, TypeError):
            raise UserError(f"{path}: damaged: delete it and make the links again") from None


class Linked(Step):
    """Keeps the pages that a link leads to; http and https are the same, and so are URLs with and without www."""

    batch = 1024

    def __init__(self, folder: Path) -> None:
        super().__init__("links")
        self.folder = folder

    @cached_property
    def keys(self) -> np.ndarray:
        return np.load(self.folder / KEYS, mmap_mode="r")

    def apply(self, docs: Sequence[Document]) -> list[str | None]:
        wanted = np.array([key_of(doc.metadata.get("url") or "") for doc in docs], "<u8")
        if not len(self.keys):
            return ["not linked"] * len(docs)
        index = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        return [None if linked else "not linked" for linked in self.keys[index] == wanted]


def key_of(url: str) -> int:
    """The key of the page that a URL leads to; 0 for what is no web address."""
    normal = normalize(url)
    return normal.key if normal else 0
