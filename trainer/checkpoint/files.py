"""A checkpoint's files: written raw, read range by range. No DeepSpeed, no pickle.

The index holds the layout of every parameter, those of heads and other trunks too. Files that are read may come from
anyone: names and sizes are checked before they are used.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Annotated, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from conf.errors import UserError, of_nature
from data_pipeline.files import from_json, read_json
from trainer.checkpoint.find import model_of
from trainer.checkpoint.verify import FORMAT, INDEX, file_name
from trainer.model.specs import ParamSpec, from_local, specs
from trainer.run.folder import DAMAGED, STATE, RunFolder

MOMENTS = "moments"
CHUNK = 4 << 20  # bytes hashed and written at a time
SYNC = 64 << 20  # bytes between two fsyncs: one at the end of a big file would be minutes in which it does not grow


@dataclass(frozen=True)
class RankPart:
    """The files of one rank and its fragments: [parameter, start, length] each."""

    tp_rank: int
    weights: str
    moments: str
    fragments: list[Any]


@dataclass(frozen=True)
class Index:
    """index.json; `tp`: the ranks that each parameter was split over."""

    format: int
    tp: Annotated[int, range(1, 1 << 16)]
    parameters: dict[str, ParamSpec]
    ranks: list[RankPart]


def index_of(specs: Mapping[str, ParamSpec], tp: int, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """The content of index.json (`Index`)."""
    parameters = {name: asdict(spec) for name, spec in specs.items()}
    return {"format": FORMAT, "tp": tp, "parameters": parameters, "ranks": ranks}


class SavedWeights(Mapping[str, Tensor]):
    """A checkpoint's parameters: `weights[name]` is the whole fp32 weight, `part` a slice of it or of a moment.

    Raises:
        UserError: an index that does not fit the model or the files.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cfg = model_of(path, RunFolder.state(path))
        self.index = from_json(Index, read_json(path / INDEX, DAMAGED), path / INDEX, DAMAGED)
        self.specs = self.index.parameters
        self.tp = self.index.tp
        self._handles: dict[str, Any] = {}
        try:
            self._segments = self._read_index()
        except (KeyError, TypeError, ValueError, AttributeError, OSError) as e:
            raise self._damaged(f"{INDEX} ({e!r})") from None

    def __getitem__(self, name: str) -> Tensor:
        return self.full("master", name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def full(self, kind: str, name: str) -> Tensor:
        """The whole parameter (or its moment) in its true shape, fp32 on CPU."""
        spec = self.specs[name]
        shape = spec.local_shape(self.tp)
        parts = [self._read(kind, name, r, 0, prod(shape)).view(shape) for r in _tp_ranks(spec, self.tp)]
        return from_local(parts, spec)

    def part(self, kind: str, name: str, spec: ParamSpec, tp_rank: int, tp: int, start: int, length: int) -> Tensor:
        """Elements [start, start + length) of the flattened parameter as `tp_rank` of `tp` holds it, fp32 [length].

        `spec`: the parameter's layout over these `tp` ranks. Only the bytes of these elements are read; where tp splits
        columns, the rows that they lie in.
        """
        dim = self.specs[name].tp_dim
        if tp == self.tp or dim is None:  # laid out as here
            return self._read(kind, name, 0 if dim is None else tp_rank, start, length)
        shape = spec.local_shape(tp)
        width = prod(shape[1:])
        first, last = start // width, -(-(start + length) // width)  # the rows of the slice that are wanted
        if dim == 0:
            rows = self._along(kind, name, tp_rank * shape[0] + first, last - first, None)
        else:
            rows = self._along(kind, name, tp_rank * shape[1], shape[1], (first, last))
        return rows.reshape(-1)[start - first * width :][:length]

    def _along(self, kind: str, name: str, start: int, length: int, rows: tuple[int, int] | None) -> Tensor:
        """[start, start + length) along the dimension that tp splits, zeros where there is only padding.

        `rows`: of a dimension 1, those that are wanted.
        """
        spec = self.specs[name]
        dim, shape = int(rows is not None), spec.local_shape(self.tp)
        parts, end = [], max(start, min(start + length, spec.shape[dim]))
        for r in range(start // shape[dim], -(-end // shape[dim]) if end > start else 0):
            low, high = max(start - r * shape[dim], 0), min(end - r * shape[dim], shape[dim])
            if rows is None:
                width = prod(shape[1:])
                parts.append(self._read(kind, name, r, low * width, (high - low) * width).view(-1, *shape[1:]))
            else:
                whole = self._read(kind, name, r, rows[0] * shape[1], (rows[1] - rows[0]) * shape[1])
                parts.append(whole.view(-1, shape[1])[:, low:high])
        missing = length - sum(p.shape[dim] for p in parts)
        like = (missing, *shape[1:]) if rows is None else (rows[1] - rows[0], missing)
        return torch.cat([*parts, torch.zeros(like)], dim)

    def _read(self, kind: str, name: str, tp_rank: int, start: int, length: int) -> Tensor:
        out = torch.empty(length, dtype=torch.float32)
        for weights, moments, a, n in self._segments[name, tp_rank]:
            low, high = max(a, start), min(a + n, start + length)
            if low < high:
                file = weights if kind == "master" else moments
                out[low - start : high - start] = self._slice(file, f"{kind}/{name}", n)[low - a : high - a]
        return out

    def _slice(self, file: str, key: str, length: int) -> Any:
        try:
            if file not in self._handles:
                self._handles[file] = safe_open(self.path / file, framework="pt")
            values = self._handles[file].get_slice(key)
        except (SafetensorError, OSError) as e:
            raise self._damaged(f"{file} ({e})") from None
        if values.get_shape() != [length] or values.get_dtype() != "F32":
            raise self._damaged(
                f"{file}: {key} has {values.get_dtype()} {values.get_shape()}, {INDEX} says F32 [{length}]"
            )
        return values

    def _read_index(self) -> dict[tuple[str, int], list[tuple[str, str, int, int]]]:
        """(parameter, tp rank) -> (weights file, moments file, start, length), which tile it and fit into the file."""
        if differ := [name for name, spec in specs(self.cfg, self.tp).items() if self.specs.get(name) != spec]:
            raise self._damaged(f"{INDEX}: {differ[0]} is not as in the model of {STATE}")
        segments: dict[tuple[str, int], list[tuple[str, str, int, int]]] = {}
        for rank in self.index.ranks:
            weights, moments = file_name(rank.weights), file_name(rank.moments)
            for name, start, length in rank.fragments:
                segments.setdefault((name, rank.tp_rank), []).append((weights, moments, int(start), int(length)))
            if 4 * sum(int(length) for _, _, length in rank.fragments) > (self.path / weights).stat().st_size:
                raise self._damaged(f"{weights} is shorter than {INDEX} says")
        for name, spec in self.specs.items():
            if spec.tp_dim is not None and spec.padded[spec.tp_dim] % self.tp:
                raise self._damaged(f"{INDEX}: {name} does not divide by tp={self.tp}")
            for tp_rank in _tp_ranks(spec, self.tp):
                end = 0
                for _, _, start, length in sorted(segments.get((name, tp_rank), []), key=lambda f: f[2]):
                    end = start + length if start == end and length > 0 else -1
                if end != prod(spec.local_shape(self.tp)):
                    raise self._damaged(f"{INDEX}: the fragments of {name} on tp rank {tp_rank} do not tile it")
        return segments

    def _damaged(self, what: str) -> UserError:
        return UserError(f"{self.path}: damaged: {what}: use another checkpoint")


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """A safetensors file of fp32 tensors, streamed: no copy of the whole, hashed while it is written."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, t in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(t.shape), "data_offsets": [offset, offset + 4 * t.numel()]}
        offset += 4 * t.numel()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def chunks() -> Iterator[bytes | memoryview]:
        yield len(text).to_bytes(8, "little") + text
        for t in tensors.values():
            yield t.detach().to("cpu", torch.float32).reshape(-1).numpy().view("uint8").data

    return write_file(path, chunks())


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write a new file to the disk itself (fsync); returns its bytes and sha256.

    Raises:
        UserError: the disk refuses, naming the file; TransientError, if that may pass: it is full.
    """
    digest, size, synced = hashlib.sha256(), 0, 0
    try:
        with path.open("xb") as f:
            for chunk in chunks:
                for i in range(0, len(chunk), CHUNK):
                    digest.update(chunk[i : i + CHUNK])
                    size += f.write(chunk[i : i + CHUNK])
                    if size - synced >= SYNC:
                        f.flush()
                        os.fsync(f.fileno())
                        synced = size
            f.flush()
            os.fsync(f.fileno())
    except OSError as e:
        message = f"{path}: {e.strerror}: give run.dir a disk with room, or a lower checkpoint.keep"
        raise of_nature(e, message) from None
    return {"bytes": size, "sha256": digest.hexdigest()}


def _tp_ranks(spec: ParamSpec, tp: int) -> range:
    """The tp ranks that hold a part of their own; what is replicated, tp rank 0 holds for all."""
    return range(tp if spec.tp_dim is not None else 1)
