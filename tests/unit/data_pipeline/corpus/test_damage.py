"""Compressed files of several members, cut ones and damaged ones: every whole line that can be had is read."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import subprocess
import zlib
from pathlib import Path

import pytest
import zstandard

from conf.errors import UserError
from tests.unit.data_pipeline.corpus.test_read import corpus, counts, read_all

PACK = {
    "gz": gzip.compress,
    "zst": zstandard.ZstdCompressor(write_checksum=True).compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
}
TEXTS = [os.urandom(250).hex() for _ in range(300)]
BODY = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS)


def read_texts(path: Path) -> tuple[list[str], dict[str, int]]:
    found, report = read_all(corpus(path, "jsonl"))
    return [doc.text for doc in found], counts(report)


def whole_lines(data: bytes) -> int:
    return data.count(b"\n")


@pytest.mark.parametrize("cut", [4, 100, 5_000, 50_000])
def test_a_cut_gzip_gives_the_lines_that_gunzip_gives(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(BODY)[:-cut])
    there = subprocess.run(["gunzip", "-c", path], capture_output=True, check=False).stdout
    found, dropped = read_texts(path)
    assert found == TEXTS[: whole_lines(there)]
    assert dropped == {"the rest of the file cannot be read (it is cut off)": 1}


def test_a_wrong_checksum_costs_no_line_that_came_before(tmp_path: Path) -> None:
    for ending, at in (("gz", -8), ("zst", -4), ("xz", -12)):
        packed = bytearray(PACK[ending](BODY))
        packed[at] ^= 1
        (tmp_path / f"a.jsonl.{ending}").write_bytes(packed)
        found, dropped = read_texts(tmp_path / f"a.jsonl.{ending}")
        assert found == TEXTS, ending
        assert list(dropped.values()) == [1], (ending, dropped)


def test_broken_bytes_cost_no_line_before_them(tmp_path: Path) -> None:
    packer = zlib.compressobj(wbits=31)
    good = packer.compress(BODY) + packer.flush(zlib.Z_FULL_FLUSH)
    (tmp_path / "a.jsonl.gz").write_bytes(good + b"\xff" * 20_000)  # a kind of block that there is not
    found, dropped = read_texts(tmp_path / "a.jsonl.gz")
    assert found == TEXTS and list(dropped.values()) == [1]


@pytest.mark.parametrize("ending", PACK)
def test_garbage_behind_the_end_costs_no_line_and_counts(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.jsonl.{ending}"
    path.write_bytes(PACK[ending](BODY) + b"garbage")
    assert read_texts(path) == (
        TEXTS,
        {"the rest of the file cannot be read (bytes of another kind follow its end)": 1},
    )
    path.write_bytes(PACK[ending](BODY) + bytes(5000))  # tapes and disks fill files up
    assert read_texts(path) == (TEXTS, {})
    path.write_bytes(bytes(5000))
    with pytest.raises(UserError, match="1 the rest of the file cannot be read"):
        read_texts(path)


@pytest.mark.parametrize("ending", PACK)
def test_all_members_of_a_compressed_file_are_read(ending: str, tmp_path: Path) -> None:
    lines = BODY.splitlines(keepends=True)
    path = tmp_path / f"a.jsonl.{ending}"
    path.write_bytes(b"".join(PACK[ending](b"".join(lines[i : i + 7])) for i in range(0, 300, 7)))
    assert read_texts(path) == (TEXTS, {})
