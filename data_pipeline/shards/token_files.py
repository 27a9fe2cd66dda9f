"""Other programs' files of token ids -> documents: nanoGPT's and llm.c's .bin, Megatron's .bin with .idx, JSON lines.

Read by their published layouts, without those programs, piece by piece: at most one document, or a megabyte of a
stream, is held at once. The sizes that a file claims are compared with its own size before anything else is read.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import cast

import numpy as np

from conf.errors import UserError
from data_pipeline.corpus.corpus_config import CorpusConfig, CorpusFormat
from data_pipeline.corpus.document import Dropped, field_of
from data_pipeline.corpus.inputs import Input, files_at
from data_pipeline.corpus.read import records
from data_pipeline.shards.pieces import MAX_TOKENS, TOO_LONG, Piece
from data_pipeline.shards.shards_config import ImportConfig, TokenFormat

CHUNK = 1 << 19  # tokens of a stream, or entries of an index, that are read at once
LLMC = {20240520: (1, "<u2"), 20240801: (7, "<u4")}  # llm.c's magic numbers: version, dtype
LLMC_HEADER = 1024  # bytes: 256 int32, which are magic, version, number of tokens, zeros
MEGATRON = b"MMIDIDX\x00\x00" + (1).to_bytes(8, "little")
MEGATRON_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
MEGATRON_HEADER = 34  # bytes: magic, version, dtype, number of sequences, number of document edges


def inputs(cfg: ImportConfig) -> list[Input]:
    """The files that an import reads, sorted by name.

    Raises:
        UserError: there are none.
    """
    given = Path(cfg.input)
    if cfg.format is TokenFormat.megatron and not given.exists() and Path(f"{given}.idx").is_file():
        given = Path(f"{given}.idx")  # Megatron names a data set by the name before .bin and .idx
    if cfg.format is TokenFormat.megatron and given.suffix in (".bin", ".idx") and given.is_file():
        pair = {given.with_suffix(".bin"), given.with_suffix(".idx")}
        files = [file for part in sorted(pair) if part.is_file() for file in files_at(str(part), "input")]
    elif cfg.format is TokenFormat.mds and given.name == "index.json":
        files = files_at(str(given.parent), "input")
    else:
        files = files_at(cfg.input, "input")
    if not files:
        raise UserError(f"input={cfg.input}: no file there: name a file, a folder or a glob with files")
    return files


def pieces(cfg: ImportConfig, files: list[Input]) -> Iterator[tuple[str, Iterator[Piece | Dropped]]]:
    """(name, its documents or the pieces of its stream) for each file of ids."""
    from data_pipeline.shards import mds

    names = {file.name for file in files}
    if cfg.format is TokenFormat.jsonl:
        corpus = CorpusConfig(name="ids", format=CorpusFormat.jsonl, path=cfg.input)
        yield from ((file.name, _jsonl(cfg, corpus, file)) for file in files)
    elif cfg.format is TokenFormat.nanogpt:
        for file in files:
            ours = file.name.endswith(".bin") or len(files) == 1
            yield file.name, _nanogpt(cfg, file) if ours else iter([Dropped("not a .bin file", file.name)])
    elif cfg.format is TokenFormat.megatron:
        for file in files:
            if file.name.endswith(".idx"):
                yield file.name, _megatron(file)
            elif not file.name.endswith(".bin") or f"{file.name[:-4]}.idx" not in names:
                yield file.name, iter([Dropped("neither an .idx nor the .bin beside one", file.name)])
    else:
        yield from mds.data_sets(cfg, files)


def _nanogpt(cfg: ImportConfig, file: Input) -> Iterator[Piece]:
    dtype, skip = np.dtype(cfg.dtype.value if cfg.dtype else "uint16").newbyteorder("<"), 0
    with file.path.open("rb") as f:
        magic, version, tokens = struct.unpack("<3i", f.read(12)) if file.size >= LLMC_HEADER else (0, 0, 0)
        if magic in LLMC:
            known, code = LLMC[magic]
            dtype, skip = np.dtype(code), LLMC_HEADER
            if version != known:
                raise UserError(f"{file.path}: llm.c's format of version {version}, only {known} is known")
            if tokens * dtype.itemsize != file.size - skip:
                raise UserError(
                    f"{file.path}: its header says {tokens} tokens, the file has room for "
                    f"{(file.size - skip) / dtype.itemsize:g}: it is truncated or damaged, get it again"
                )
        if (file.size - skip) % dtype.itemsize:
            raise UserError(f"{file.path}: {file.size} bytes are no whole number of {dtype.name} ids: give its dtype=")
        f.seek(skip)
        if not (cfg.dtype or skip) and (wider := _wider(np.fromfile(f, dtype, CHUNK))):
            raise UserError(
                f"{file.path}: every other id is 0 or tiny, so this reads as {wider}: give dtype={wider}, or "
                f"dtype=uint16 if its ids are so"
            )
        f.seek(skip)
        for start in range(0, (file.size - skip) // dtype.itemsize, CHUNK):
            data = f.read(min(CHUNK * dtype.itemsize, file.size - skip - start * dtype.itemsize))
            yield Piece(file.name, file.name, np.frombuffer(data, dtype), len(data), start)


def _wider(ids: np.ndarray) -> str | None:
    """The dtype of ids that were read as uint16 and are wider: the high parts of an id below 2^20 are below 16."""
    for width, dtype in ((4, "int64"), (2, "uint32")):
        parts = ids[: len(ids) // width * width].reshape(-1, width)
        low, high, rest = parts[:, 0], parts[:, 1], parts[:, 2:]
        if len(low) < 8 or not low.any() or rest.any():
            continue
        if not high.any() or (high.max() < 16 and low.max() >= 256):
            return dtype
    return None


def _megatron(index: Input) -> Iterator[Piece | Dropped]:
    """Documents of PREFIX.idx and PREFIX.bin; a document's sequences follow each other."""
    path, name = index.path.with_suffix(".bin"), f"{index.name[:-4]}.bin"
    if not path.is_file():
        raise UserError(f"{index.path}: {path.name} is not beside it: Megatron's data sets are two files")
    with index.path.open("rb") as f:
        header = f.read(MEGATRON_HEADER)
    if len(header) < MEGATRON_HEADER or header[:17] != MEGATRON or header[17] not in MEGATRON_DTYPES:
        raise UserError(f"{index.path}: not an index of Megatron's version 1 over integers")
    dtype = np.dtype(MEGATRON_DTYPES[header[17]])
    sequences, edges = int.from_bytes(header[18:26], "little"), int.from_bytes(header[26:34], "little")
    needed = MEGATRON_HEADER + 12 * sequences + 8 * edges
    if (
        index.size not in (needed, needed + sequences) or not edges or (not sequences and edges > 1)
    ):  # a mode for each sequence may follow
        raise UserError(
            f"{index.path}: {sequences} sequences and {edges} edges of documents take {needed} bytes, it has "
            f"{index.size}: it is truncated or damaged, get it again"
        )
    if not sequences and not path.stat().st_size:
        return  # no memmap is empty
    lengths = np.memmap(index.path, "<i4", "r", MEGATRON_HEADER, (sequences,))
    pointers = np.memmap(index.path, "<i8", "r", MEGATRON_HEADER + 4 * sequences, (sequences,))
    documents = np.memmap(index.path, "<i8", "r", MEGATRON_HEADER + 12 * sequences, (edges,))
    _check_sequences(index.path, path, lengths, pointers, dtype.itemsize)
    end, last = path.stat().st_size, 0
    with path.open("rb") as f:
        for first in range(0, edges - 1, CHUNK):
            edge = np.array(documents[first : first + CHUNK + 1])
            if edge[0] != last or (np.diff(edge) < 0).any() or edge[-1] > sequences:
                raise UserError(f"{index.path}: documents {first} and on do not divide its {sequences} sequences")
            last = int(edge[-1])
            bounds = np.where(edge < sequences, pointers[np.minimum(edge, sequences - 1)], end).tolist()
            for number, (a, b) in enumerate(pairwise(bounds), first):
                document = f"{name}:{number}"
                if b - a > MAX_TOKENS * dtype.itemsize:
                    f.seek(b)
                    yield Dropped(TOO_LONG, document)
                else:
                    yield Piece(document, document, np.frombuffer(f.read(b - a), dtype), b - a)
    if last != sequences:
        raise UserError(f"{index.path}: its documents hold {last} of its {sequences} sequences")


def _check_sequences(index: Path, path: Path, lengths: np.ndarray, pointers: np.ndarray, itemsize: int) -> None:
    """Check that each sequence starts at the end of the one before it, and the last one ends with the file."""
    end, cure = 0, "it is damaged, get it again"
    for first in range(0, len(lengths), CHUNK):
        length = np.array(lengths[first : first + CHUNK], np.int64)
        ends = end + np.cumsum(length) * itemsize
        expected = np.concatenate([[end], ends[:-1]])
        bad = np.flatnonzero((length < 0) | (pointers[first : first + CHUNK] != expected))
        if len(bad):
            i = int(bad[0])
            raise UserError(
                f"{index}: sequence {first + i} has {length[i]} tokens at byte {pointers[first + i]}, those before it "
                f"end at byte {expected[i]}: {cure}"
            )
        end = int(ends[-1])
    if end != path.stat().st_size:
        raise UserError(f"{path}: {path.stat().st_size} bytes, the sequences of {index.name} take {end}: {cure}")


def _jsonl(cfg: ImportConfig, corpus: CorpusConfig, file: Input) -> Iterator[Piece | Dropped]:
    for record in records(corpus, [file]):
        if isinstance(record, Dropped):
            yield record
            continue
        for number, line in enumerate(cast(bytes, record.lines).split(b"\n"), record.first_line):
            yield _line(cfg, line, f"{file.name}:{number}", record.size if number == record.first_line else 0)


def _line(cfg: ImportConfig, line: bytes, path: str, size: int) -> Piece | Dropped:
    try:
        body = json.loads(line) if line.strip() else None
    except (ValueError, RecursionError):
        return Dropped("not JSON", path)
    if body is None:
        return Dropped("empty", path)
    ids, name = field_of(body, cfg.tokens_key), field_of(body, cfg.id_key)
    if not isinstance(ids, list) or not {type(i) for i in ids} <= {int}:
        return Dropped(f"no list of ids in the field {cfg.tokens_key!r}", path)
    try:
        str(name).encode()
        tokens = np.array(ids, np.int64)
    except UnicodeEncodeError:
        return Dropped("not Unicode (a lone surrogate)", path)
    except OverflowError:
        raise UserError(f"{path}: an id of {max(ids, key=abs)}, more than 64 bits hold") from None
    return Piece(str(name) if isinstance(name, str | int) else path, path, tokens, size)
