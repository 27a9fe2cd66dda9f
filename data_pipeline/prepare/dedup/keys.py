"""Keys of a part's documents, by which duplicates are found, in one file beside the part.

A keys file is safetensors of n rows, one for each document of the part, in order:

    url         [n] uint64        of the URL; 0 = it has none
    exact       [n] uint64        of the text as it is; 0 = it is empty
    words       [n] uint64        of the text's plain form; 0 = it has no word
    bands       [bands, n] uint64 MinHash, if the recipe has it; 0 = none
    score       [n] float32       of the quality model; NaN = none
    date        [n] int64         seconds since 1970 (UTC); NO_DATE, which is later than any = none or not ISO 8601
    grams       [any] uint32      if the recipe compares them: each row's set of n-grams, sorted
    gram_ends   [n] int64         the end of each row's set

Keys are 64 bits: among a billion documents the chance that two different ones share a key is 3%.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt

from conf.errors import UserError, of_nature
from data_pipeline.corpus.document import Document
from data_pipeline.files import publish
from data_pipeline.prepare.dedup.minhash import MinHash
from data_pipeline.prepare.recipe_config import DedupConfig, MinHashConfig
from data_pipeline.text.hashing import U64, pieces, plain_form

FORMAT = 2
ENDING = ".safetensors"
NO_DATE = np.iinfo(np.int64).max
_PORTS = {"http": ":80", "https": ":443"}


def url_key(url: str | None) -> int:
    """64 bits of the URL, 0 for none. http and https are one, and the host's letters have no case; the scheme's own
    port, the fragment, and slashes at the end of the path count for nothing. The query stays as it is."""
    import xxhash

    url = (url or "").strip()
    if not url:
        return 0
    try:
        parts = urlsplit(url)
    except ValueError:  # brackets that hold no IPv6 address
        same = url
    else:
        netloc = parts.netloc.lower().removesuffix(_PORTS.get(parts.scheme, "\0"))
        scheme = "" if parts.scheme in _PORTS else parts.scheme + ":"
        query = f"?{parts.query}" if parts.query else ""
        same = f"{scheme}//{netloc}{parts.path.rstrip('/')}{query}"
    return max(1, xxhash.xxh3_64_intdigest(same.encode("utf-8", "surrogatepass")))


def exact_key(text: str) -> int:
    """64 bits of the text, 0 for none."""
    import xxhash

    return max(1, xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))) if text else 0


def words_key(text: str) -> int:
    """64 bits of the text but for case, punctuation and spaces; 0 if it has nothing else."""
    import xxhash

    total, digest = 0, xxhash.xxh3_64()
    for _, piece in pieces(text):
        words = plain_form(piece)
        total += len(words)
        digest.update(words)
    return max(1, digest.intdigest()) if total else 0


def write_keys(path: Path, docs: Sequence[Document], cfg: DedupConfig) -> None:
    """Publish the keys of a part's documents, in their order, atomically; the same bytes each time."""
    from safetensors.numpy import save

    texts = [doc.text for doc in docs]
    columns: dict[str, np.ndarray] = {
        "url": np.array([url_key(doc.metadata.get("url")) for doc in docs], np.uint64),
        "exact": np.array([exact_key(text) for text in texts], np.uint64),
        "words": np.array([words_key(text) for text in texts], np.uint64),
        "score": np.array([doc.metadata.get("score", np.nan) for doc in docs], np.float32),
        "date": np.array([_seconds(doc.metadata.get("date")) for doc in docs], np.int64),
    }
    if cfg.minhash:
        minhash = _minhash(*settings_of(cfg.minhash))
        if cfg.minhash.min_jaccard is None:
            bands = minhash.bands_of(texts)
        else:
            bands, columns["grams"], columns["gram_ends"] = minhash.bands_and_sets_of(texts)
        columns["bands"] = np.ascontiguousarray(bands.T)
    path.parent.mkdir(parents=True, exist_ok=True)
    publish(path, save(columns, {"made": _made(cfg.minhash)}))


def settings_of(minhash: MinHashConfig) -> tuple[int, int, int, int, bool]:
    """The settings on which the bands depend."""
    return minhash.bands, minhash.rows, minhash.ngram, minhash.seed, minhash.numbers


class KeysFile:
    """One part's keys, read column by column; the file is open only while it is read, for there may be many.

    Raises:
        UserError: not such a file, or made with other settings of `minhash` than these.
    """

    def __init__(self, path: Path, minhash: MinHashConfig | None) -> None:
        self.path = path
        with self._open() as file:
            made = (file.metadata() or {}).get("made", "a program unknown")
            slices = {name: file.get_slice(name) for name in list(file.keys())}
            columns = {name: (column.get_dtype(), column.get_shape()) for name, column in slices.items()}
        if minhash and made != _made(minhash):
            raise UserError(f"{path}: made with {made}, wanted is {_made(minhash)}: {_ANEW}")
        self.rows = columns["url"][1][0] if "url" in columns else 0
        rows = [self.rows]
        wanted = dict.fromkeys(("url", "exact", "words"), ("U64", rows))
        wanted |= {"score": ("F32", rows), "date": ("I64", rows)}
        if minhash:
            wanted["bands"] = ("U64", [minhash.bands, self.rows])
            if minhash.min_jaccard is not None:
                wanted["gram_ends"] = ("I64", rows)
        for name, right in wanted.items():
            if columns.get(name) != right:
                raise UserError(f"{self.path}: damaged: {name} is {columns.get(name)}, not {right}: {_ANEW}")

    @contextmanager
    def _open(self) -> Iterator[Any]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, framework="numpy") as file:
                yield file
        except (SafetensorError, OSError) as e:
            raise of_nature(e, f"{self.path}: not a keys file ({e}): {_ANEW}") from None

    def column(self, name: str) -> np.ndarray:
        """url, exact, words, score, date or gram_ends, [rows]; bands, [bands, rows]."""
        with self._open() as file:
            return file.get_tensor(name)

    def band(self, band: int) -> U64:
        """The keys of one band, [rows]."""
        with self._open() as file:
            return file.get_slice("bands")[band]

    def set_sizes(self) -> npt.NDArray[np.int64]:
        """The number of n-grams of each row, [rows]."""
        return np.diff(self.column("gram_ends"), prepend=0)

    def sets(self, rows: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.uint32]]:
        """The n-gram set of each of these rows."""
        bounds = np.concatenate([[0], self.column("gram_ends")])
        with self._open() as file:
            grams = file.get_slice("grams")
            for row in rows.tolist():
                yield grams[int(bounds[row]) : int(bounds[row + 1])]


_ANEW = "make the corpus again with this recipe, data_pipeline.prepare.run"


def _made(minhash: MinHashConfig | None) -> str:
    if minhash is None:
        return f"format {FORMAT}, no minhash"
    bands, rows, ngram, seed, numbers = settings_of(minhash)
    sets = ("" if minhash.min_jaccard is None else ", n-gram sets") + (", numbers" if numbers else "")
    return f"format {FORMAT}, bands={bands} rows={rows} ngram={ngram} seed={seed}{sets}"


@cache
def _minhash(bands: int, rows: int, ngram: int, seed: int, numbers: bool) -> MinHash:
    return MinHash(MinHashConfig(bands, rows, ngram, numbers, seed=seed))


def _seconds(date: str | None) -> int:
    try:
        time = datetime.fromisoformat(date or "")
    except ValueError:
        return int(NO_DATE)
    return int((time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp())
