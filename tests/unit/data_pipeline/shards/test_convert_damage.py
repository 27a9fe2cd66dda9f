"""What an import refuses: each damaged or crafted file is one line that says where, and takes no memory."""

from __future__ import annotations

import gzip
import json
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from conf.errors import UserError
from data_pipeline.shards import convert
from data_pipeline.shards.shards_config import ExportConfig, Width
from tests.unit.data_pipeline.shards.test_convert import EOT, as_ndarray, config, documents_of, write_mds
from tests.unit.data_pipeline.shards.test_convert import home as home


def patch(path: Path, at: int, kind: str, *values: int) -> None:
    data = bytearray(path.read_bytes())
    struct.pack_into(kind, data, at, *values)
    path.write_bytes(data)


def edit(path: Path, **change: object) -> None:
    """Change what an index.json says of its first shard."""
    body = json.loads(path.read_text())
    body["shards"][0] |= change
    path.write_text(json.dumps(body))


def shorten(path: Path, by: int = 2) -> None:
    path.write_bytes(path.read_bytes()[:-by])


def lengthen(path: Path, data: bytes = b"\0\0") -> None:
    path.write_bytes(path.read_bytes() + data)


def bomb(path: Path) -> None:
    """256 MiB of zeros, packed, behind a whole shard."""
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + bytes(1 << 28), 1))


IDX, BIN, SHARD = "megatron/x.idx", "megatron/x.bin", "mds/shard.00000.mds"
LENGTHS, POINTERS = 34, 34 + 4 * 3
RAW = {"basename": "shard.00000.mds", "bytes": 1 << 40, "hashes": {}}
DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "half an id": ("nanogpt", lambda p: shorten(p / "nanogpt/x.bin", 1), "x.bin: .* no whole number of uint16 ids"),
    "llm.c's header over less": ("llmc", lambda p: shorten(p / "llmc/x.bin"), "its header says 6 tokens, .* for 5: "),
    "llm.c's header over all memory": (
        "llmc",
        lambda p: patch(p / "llmc/x.bin", 8, "<i", 2**31 - 1),
        "its header says 2147483647 tokens",
    ),
    "a negative count": ("llmc", lambda p: patch(p / "llmc/x.bin", 8, "<i", -6), "its header says -6 tokens"),
    "an unknown version": ("llmc", lambda p: patch(p / "llmc/x.bin", 4, "<i", 9), "version 9, only 1 is known"),
    "an id past the vocabulary": (
        "nanogpt",
        lambda p: patch(p / "nanogpt/x.bin", 8, "<H", 60_000),
        "x.bin: token 4 is 60000, in a vocabulary of 60000 ids: give the tokenizer= ",
    ),
    "a negative id": ("megatron", lambda p: patch(p / BIN, 8, "<i", -1), "x.bin:1: token 0 is -1, in a vocabulary"),
    "no magic": ("megatron", lambda p: patch(p / IDX, 0, "<B", 0), "x.idx: not an index of Megatron's version 1"),
    "another version": ("megatron", lambda p: patch(p / IDX, 9, "<Q", 2), "x.idx: not an index of Megatron's version"),
    "floats": ("megatron", lambda p: patch(p / IDX, 17, "<B", 7), "x.idx: not an index of .* over integers"),
    "a shortened index": (
        "megatron",
        lambda p: shorten(p / IDX),
        "x.idx: 3 sequences and 4 edges .* take 102 bytes, it",
    ),
    "no index": ("megatron", lambda p: (p / IDX).write_bytes(b""), "x.idx: not an index of Megatron's"),
    "more sequences than memory": (
        "megatron",
        lambda p: patch(p / IDX, 18, "<Q", 2**60),
        "x.idx: 1152921504606846976 s",
    ),
    "more documents than memory": (
        "megatron",
        lambda p: patch(p / IDX, 26, "<Q", 2**63),
        "and 9223372036854775808 edg",
    ),
    "a negative length": ("megatron", lambda p: patch(p / IDX, LENGTHS + 4, "<i", -1), "sequence 1 has -1 tokens"),
    "a length past the file": (
        "megatron",
        lambda p: patch(p / IDX, LENGTHS + 8, "<i", 2**31 - 1),
        "x.bin: 24 bytes, the sequences of x.idx take 8589934604",
    ),
    "a pointer outside": (
        "megatron",
        lambda p: patch(p / IDX, POINTERS + 8, "<q", 2**40),
        "at byte 1099511627776, those",
    ),
    "a negative pointer": (
        "megatron",
        lambda p: patch(p / IDX, POINTERS, "<q", -8),
        "sequence 0 has 2 tokens at byte -8",
    ),
    "documents out of order": (
        "megatron",
        lambda p: patch(p / IDX, POINTERS + 8 * 3 + 8, "<q", 3),
        "documents 0 and on do not divide its 3 sequences",
    ),
    "documents past the end": (
        "megatron",
        lambda p: patch(p / IDX, POINTERS + 8 * 6, "<q", 2**40),
        "documents 0 and on do not divide its 3 sequences",
    ),
    "documents that leave some out": (
        "megatron",
        lambda p: patch(p / IDX, POINTERS + 8 * 6, "<q", 2),
        "its documents hold 2 of its 3 sequences",
    ),
    "a shortened .bin": ("megatron", lambda p: shorten(p / BIN), "x.bin: 22 bytes, the sequences of x.idx take 24"),
    "a longer .bin": ("megatron", lambda p: lengthen(p / BIN), "x.bin: 26 bytes, the sequences of x.idx take 24"),
    "no .bin": ("megatron", lambda p: (p / BIN).unlink(), "x.idx: x.bin is not beside it"),
    "no JSON": ("mds", lambda p: (p / "mds/index.json").write_text("{"), "index.json: not JSON"),
    "no shards": ("mds", lambda p: (p / "mds/index.json").write_text("{}"), "index.json: not an index of MDS shards"),
    "another format": ("mds", lambda p: edit(p / "mds/index.json", format="csv"), "csv of version 2, only mds"),
    "no shard": ("mds", lambda p: (p / SHARD).unlink(), "shard.00000.mds: not there, but index.json names it"),
    "a path elsewhere": (
        "mds",
        lambda p: edit(p / "mds/index.json", raw_data={**RAW, "basename": "../../etc/passwd"}),
        "'../../etc/passwd' is not the name of a file",
    ),
    "a shortened shard": ("mds", lambda p: shorten(p / SHARD), "shard.00000.mds: .* bytes, index.json says"),
    "a size that is no number": (
        "mds",
        lambda p: edit(p / "mds/index.json", samples="3"),
        "not an index of MDS shards",
    ),
    "more samples than are told": ("mds", lambda p: patch(p / SHARD, 0, "<I", 2**32 - 1), "4294967295 samples in "),
    "more samples than memory": (
        "mds",
        lambda p: [edit(p / "mds/index.json", samples=2**32 - 1), patch(p / SHARD, 0, "<I", 2**32 - 1)],
        "4294967295 samples in one shard, at most 16777216 are read",
    ),
    "samples that overlap": ("mds", lambda p: patch(p / SHARD, 8, "<I", 20), "do not lie one behind the other"),
    "a sample past the file": ("mds", lambda p: patch(p / SHARD, 4 + 3 * 4, "<I", 2**31), "do not lie one behind"),
    "a column past its sample": (
        "mds",
        lambda p: patch(p / SHARD, struct.unpack_from("<I", (p / SHARD).read_bytes(), 4)[0], "<I", 2**32 - 1),
        "sample shard.00000.mds:0 has .* bytes, its columns say .4294967295, 8, ",
    ),
    "an encoding that is no ids": (
        "mds",
        lambda p: edit(p / "mds/index.json", column_encodings=["str", "int", "pkl", "pkl"]),
        "column 'tokens' holds pkl, which are no ids",
    ),
    "bytes of nobody knows what": (
        "mds",
        lambda p: edit(p / "mds/index.json", column_encodings=["str", "int", "bytes", "pkl"]),
        "column 'tokens' holds bytes: say of what, dtype=int64",
    ),
    "an array that claims more": (
        "mds",
        lambda p: edit(p / "mds/index.json", column_encodings=["str", "int", "ndarray:int64", "pkl"]),
        "an array of shape .2. in 4 bytes",
    ),
    "no such column": (
        "mds",
        lambda p: edit(p / "mds/index.json", column_names=list("abcd")),
        "no column 'tokens' among",
    ),
    "an archive that is cut off": ("mds_gz", lambda p: shorten(p / "mds_gz/shard.00000.mds.gz", 20), "mds.gz: "),
    "an archive that fills the memory": (
        "mds_gz",
        lambda p: bomb(p / "mds_gz/shard.00000.mds.gz"),
        "it goes on after the .* bytes that index.json says",
    ),
    "an unknown compression": (
        "mds_gz",
        lambda p: edit(p / "mds_gz/index.json", compression="br:11"),
        "compression br, on",
    ),
    "an id of many digits": (
        "jsonl",
        lambda p: (p / "jsonl/x.jsonl").write_text(f'{{"tokens": [{10**30}]}}'),
        "x.jsonl:1: an id of 10{30}, more than 64 bits hold",
    ),
    "an id past the vocabulary in a line": (
        "jsonl",
        lambda p: (p / "jsonl/x.jsonl").write_text('{"tokens": [1, 60000]}'),
        "x.jsonl:1: token 1 is 60000, in a vocabulary of 60000 ids",
    ),
    "nothing of the kind": (
        "jsonl",
        lambda p: (p / "jsonl/x.jsonl").write_text("{}"),
        r"no document in it \(0 kept; dro",
    ),
    "no file at all": ("jsonl", lambda p: (p / "jsonl/x.jsonl").unlink(), "no file there: name a file"),
}


@pytest.fixture(scope="module")
def healthy(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three documents of two tokens in each format; each comes in."""
    root, documents = tmp_path_factory.mktemp("healthy"), [np.array([n, EOT]) for n in (1, 2, 3)]
    for kind in ("nanogpt", "llmc", "megatron", "jsonl"):
        (root / kind).mkdir()
    ids = np.concatenate(documents).astype(np.uint16).tobytes()
    (root / "nanogpt/x.bin").write_bytes(ids)
    (root / "llmc/x.bin").write_bytes(struct.pack("<3i", 20240520, 1, 6).ljust(1024, b"\0") + ids)
    (root / "jsonl/x.jsonl").write_text("".join(json.dumps({"tokens": d.tolist()}) + "\n" for d in documents))
    idx = struct.pack("<9sQBQQ3i3q4q", b"MMIDIDX\0\0", 1, 4, 3, 4, 2, 2, 2, 0, 8, 16, 0, 1, 2, 3)
    (root / "megatron/x.idx").write_bytes(idx)
    (root / "megatron/x.bin").write_bytes(np.concatenate(documents).astype("<i4").tobytes())
    for name, compression in (("mds", None), ("mds_gz", "gz")):
        write_mds(root / name, [as_ndarray(d, "<u2") for d in documents], "ndarray:uint16", compression)
    for kind, name in KINDS.items():
        convert.import_(config(home, root / kind, root / "out" / kind, name))
        found = documents_of(root / "out" / kind / "train")
        assert list(found.values()) == [d.tolist() for d in documents]
    return root


KINDS = {"llmc": "nanogpt", "mds_gz": "mds", **{kind: kind for kind in ("nanogpt", "megatron", "mds", "jsonl")}}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_one_line_and_no_memory(damage: str, home: Path, healthy: Path, tmp_path: Path) -> None:
    """A damaged or crafted file is refused in one line, in bounded memory."""
    kind, spoil, message = DAMAGES[damage]
    shutil.copytree(healthy / kind, tmp_path / kind)
    spoil(tmp_path)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=message) as error:
            convert.import_(config(home, tmp_path / kind, tmp_path / "out", KINDS[kind]))
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out/train/manifest.json").exists()


def test_values_that_cannot_be_meant_are_refused(home: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"dtype=uint16: megatron files say it themselves"):
        config(home, tmp_path, tmp_path, "megatron", dtype=Width.uint16)
    with pytest.raises(UserError, match=r"block_tokens=9000 and shard_tokens=3000: give 0 < block_tokens"):
        config(home, tmp_path, tmp_path, "jsonl", block_tokens=9000)
    with pytest.raises(UserError, match=r"output=x.npy: give the name of a file that ends in .bin"):
        ExportConfig("data/train", "x.npy")
    with pytest.raises(UserError, match=r"input=.*gone: no such file or folder"):
        convert.import_(config(home, tmp_path / "gone", tmp_path, "mds"))
