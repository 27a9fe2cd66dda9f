"""MosaicML streaming's shards (MDS) -> documents, by the published layout and without that package.

index.json names the shards and their columns. A shard is

    uint32 samples; uint32 offsets [samples + 1]; the columns as JSON (a copy of what index.json says); samples

and a sample is a uint32 size for each column whose size varies, then the columns' bytes one after the other. Only the
column of ids is decoded; others, which may hold a pickle, are skipped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from conf.errors import UserError, of_nature
from data_pipeline.corpus.document import Dropped
from data_pipeline.corpus.inputs import Input
from data_pipeline.corpus.lines import chunks, codec_of
from data_pipeline.files import read_json
from data_pipeline.shards.pieces import MAX_TOKENS, TOO_LONG, Piece
from data_pipeline.shards.shards_config import ImportConfig

INDEX = "index.json"
MAX_SAMPLES = 1 << 24  # of a shard
SUFFIXES = {"zstd": ".zst", "gz": ".gz"}  # compressions, and their endings in data_pipeline/corpus/lines.py
DTYPES = {8: "u1", 9: "i1", 16: "<u2", 17: "<i2", 32: "<u4", 33: "<i4", 64: "<u8", 65: "<i8"}
NAMES = {"uint8": 8, "int8": 9, "uint16": 16, "int16": 17, "uint32": 32, "int32": 33, "uint64": 64, "int64": 65}
GET_ANEW = "it is damaged, get it again"


class Shard(NamedTuple):
    """The entry of one shard in index.json. `path` is the file on the disk, `suffix` names its compression."""

    path: Path
    suffix: str
    name: str
    bytes: int  # when decompressed
    samples: int
    sizes: tuple[int | None, ...]  # of the columns; None = it varies
    column: int  # the one with the ids
    encoding: str


def data_sets(cfg: ImportConfig, files: list[Input]) -> Iterator[tuple[str, Iterator[Piece | Dropped]]]:
    """(name, its documents) for each index.json, and a `Dropped` for a file that none names."""
    named: set[Path] = set()
    for index in files:
        if index.path.name == INDEX:
            shards = list(_shards(cfg, index))
            named |= {index.path, *(shard.path for shard in shards)}
            yield index.name, (piece for shard in shards for piece in _samples(cfg, shard))
    for file in files:
        if file.path not in named:
            yield file.name, iter([Dropped(f"named by no {INDEX}", file.name)])


def _shards(cfg: ImportConfig, index: Input) -> Iterator[Shard]:
    body = read_json(index.path, "give a folder that MosaicML's MDSWriter wrote")
    prefix = index.name.removesuffix(INDEX)
    try:
        for shard in body["shards"]:
            if (shard["format"], shard["version"]) != ("mds", 2):
                raise ValueError(f"{shard['format']} of version {shard['version']}, only mds of version 2 is known")
            yield _shard(cfg, shard, index.path.parent, prefix)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise UserError(f"{index.path}: not an index of MDS shards ({e!r}): {GET_ANEW}") from None


def _shard(cfg: ImportConfig, shard: dict[str, Any], folder: Path, prefix: str) -> Shard:
    names, encodings, sizes = (shard[f"column_{part}"] for part in ("names", "encodings", "sizes"))
    raw, packed, samples = shard["raw_data"], shard.get("zip_data"), shard["samples"]
    for name in [raw["basename"], *([packed["basename"]] if packed else [])]:
        if Path(name).name != name:  # a path could point anywhere
            raise ValueError(f"shard {name!r} is not the name of a file")
    whole = [raw["bytes"], samples, *(size for size in sizes if size is not None)]
    if any(type(n) is not int or n < 0 for n in whole) or not len(names) == len(encodings) == len(sizes):
        raise ValueError(f"shard {raw['basename']} of {raw['bytes']} bytes, {samples} samples, columns of {sizes}")
    if cfg.tokens_key not in names:
        raise UserError(f"{folder / INDEX}: no column {cfg.tokens_key!r} among {', '.join(names)}: give tokens_key=")
    if samples > MAX_SAMPLES:
        raise UserError(f"{folder / INDEX}: {samples} samples in one shard, at most {MAX_SAMPLES} are read")
    column = names.index(cfg.tokens_key)
    if not isinstance(encodings[column], str):
        raise ValueError(f"encoding {encodings[column]!r}")
    path, suffix = folder / raw["basename"], ""
    if not path.is_file() and packed:
        family = shard["compression"].split(":")[0]
        if family not in SUFFIXES:
            raise UserError(f"{folder}: compression {family}, only {', '.join(SUFFIXES)} are read: decompress it first")
        path, suffix = folder / packed["basename"], SUFFIXES[family]
    if not path.is_file():
        raise UserError(f"{path}: not there, but {INDEX} names it: get it again")
    sizes = tuple(size or None for size in sizes)
    name = prefix + raw["basename"]
    return Shard(path, suffix, name, raw["bytes"], samples, sizes, column, encodings[column])


class _Stream:
    """The decompressed bytes of a shard, in order; holds at most the requested bytes and one chunk."""

    def __init__(self, parts: Iterator[bytes]) -> None:
        self.parts = parts
        self.held = bytearray()

    def read(self, n: int) -> bytes:
        while len(self.held) < n:
            self.held += self._next()
        out = bytes(self.held[:n])
        del self.held[:n]
        return out

    def skip(self, n: int) -> None:
        while len(self.held) < n:
            n -= len(self.held)
            self.held = bytearray(self._next())
        del self.held[:n]

    def ended(self) -> bool:
        return not self.held and not any(self.parts)

    def _next(self) -> bytes:
        try:
            return next(self.parts)
        except StopIteration:
            raise ValueError("it ends too early") from None


def _samples(cfg: ImportConfig, shard: Shard) -> Iterator[Piece | Dropped]:
    disk = shard.path.stat().st_size
    try:
        if not shard.suffix and disk != shard.bytes:
            raise ValueError(f"{disk} bytes, {INDEX} says {shard.bytes}")
        with shard.path.open("rb") as raw:
            stream = _Stream(chunks(raw, codec_of(shard.suffix)))
            n = int.from_bytes(stream.read(4), "little")
            if n != shard.samples or 4 * (n + 2) > shard.bytes:
                raise ValueError(f"{n} samples in {shard.bytes} bytes, {INDEX} says {shard.samples}")
            offsets = np.frombuffer(stream.read(4 * (n + 1)), "<u4").astype(np.int64)
            if offsets[0] < 4 * (n + 2) or (np.diff(offsets) < 0).any() or offsets[-1] != shard.bytes:
                raise ValueError(f"its samples do not lie one behind the other in its {shard.bytes} bytes")
            stream.skip(int(offsets[0]) - 4 * (n + 2))
            for number, size in enumerate(np.diff(offsets).tolist()):
                path = f"{shard.name}:{number}"
                data = _column(stream, shard, size, path)
                if data is None:
                    yield Dropped(TOO_LONG, path)
                else:
                    yield Piece(path, path, _decode(cfg, shard.encoding, data), disk // n)
            if not stream.ended():
                raise ValueError(f"it goes on after the {shard.bytes} bytes that {INDEX} says")
    except (ValueError, IndexError, OSError) as e:
        raise of_nature(e, f"{shard.path}: {e}: {GET_ANEW}") from None


def _column(stream: _Stream, shard: Shard, size: int, path: str) -> bytes | None:
    """The bytes of the ids in the next sample, of `size` bytes; None if they are too many."""
    varying = sum(s is None for s in shard.sizes)
    if 4 * varying > size:
        raise ValueError(f"sample {path} has {size} bytes, too few for the sizes of its columns")
    given = iter(np.frombuffer(stream.read(4 * varying), "<u4").tolist())
    sizes = [next(given) if s is None else s for s in shard.sizes]
    if sum(sizes) + 4 * varying != size:
        raise ValueError(f"sample {path} has {size} bytes, its columns say {sizes}")
    stream.skip(sum(sizes[: shard.column]))
    wanted = sizes[shard.column]
    data = None if wanted > 8 * MAX_TOKENS else stream.read(wanted)
    stream.skip(sum(sizes[shard.column + (data is not None) :]))
    return data


def _decode(cfg: ImportConfig, encoding: str, data: bytes) -> np.ndarray:
    """Ids [n] of a column `bytes`, `ndarray`, `ndarray:DTYPE` or `ndarray:DTYPE:N`.

    The dtype and the shape stand before the data if the encoding does not give them.
    """
    kind, *given = encoding.split(":")
    if kind == "bytes":
        if cfg.dtype is None:
            raise UserError(f"column {cfg.tokens_key!r} holds bytes: say of what, dtype=int64 for LLM Foundry's")
        code, shape, start = NAMES[cfg.dtype.value], None, 0
    elif kind == "ndarray":
        start = 0
        if not given:
            code, start = data[0], 1
        elif given[0] in NAMES:
            code = NAMES[given[0]]
        else:
            raise UserError(f"column {cfg.tokens_key!r} holds {encoding}, which are no ids: give another tokens_key=")
        if len(given) > 1:
            shape = [int(n) for n in given[1].split(",")]
        else:
            dims, width = data[start] >> 2, 1 << (data[start] & 3)
            start += 1 + dims * width
            shape = np.frombuffer(data[start - dims * width : start], f"<u{width}").tolist()
    else:
        raise UserError(f"column {cfg.tokens_key!r} holds {encoding}, which are no ids: give another tokens_key=")
    if code not in DTYPES:
        raise ValueError(f"an array of numpy's kind {code}, not of integers")
    if shape is not None and (
        len(shape) != 1 or math.prod(shape) * np.dtype(DTYPES[code]).itemsize != len(data) - start
    ):
        raise ValueError(f"an array of shape {shape} in {len(data) - start} bytes, not a line of ids that fills them")
    return np.frombuffer(data, DTYPES[code], offset=start)
