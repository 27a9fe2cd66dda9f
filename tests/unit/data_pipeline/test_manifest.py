"""The manifest and the index: what is written is read back, and damage is named, never followed."""

from __future__ import annotations

import dataclasses
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest

from conf.errors import TransientError, UserError
from data_pipeline.files import publish_json, read_json
from data_pipeline.manifest import (
    MANIFEST,
    Block,
    Manifest,
    ShardIndex,
    ShardInfo,
    decode_block,
    encode_block,
    index_of,
    read_index,
    read_manifest,
    write_index,
    write_manifest,
)

U2 = np.dtype("<u2")


def manifest(root: Path) -> Manifest:
    shards = (ShardInfo("00000.tar", 10, "ab", 2, 9), ShardInfo("00001.tar", 11, "cd", 1, 5))
    return Manifest(root, "s", "train", "uint16", 300, 299, "ef", shards)


def test_a_manifest_and_an_index_come_back_as_they_were_written(tmp_path: Path) -> None:
    wrote = manifest(tmp_path)
    write_manifest(wrote)
    assert read_manifest(tmp_path) == wrote
    assert (wrote.tokens, wrote.documents, wrote.numpy_dtype) == (14, 3, U2)
    index = ShardIndex((Block("000000.npy", 9, 123, 1664),), ("ü", "b"), (4, 5), "ab")
    write_index(tmp_path / "00000.idx.json", index)
    assert read_index(tmp_path / "00000.idx.json") == index
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000.idx.json", "manifest.json"]  # nothing left aside


def test_windows_share_one_token_and_a_short_tail_is_unused() -> None:
    def by_hand(tokens: int, n_ctx: int) -> int:
        return sum(1 for start in range(0, tokens, n_ctx) if start + n_ctx + 1 <= tokens)

    for tokens in range(30):
        for n_ctx in range(1, 9):
            assert ShardInfo("x", 0, "", 0, tokens).windows(n_ctx) == by_hand(tokens, n_ctx)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "not a manifest of format 2"),
        ({"dtype": "object"}, "dtype='object', not uint16 or uint32"),
        (
            {"shards": [{"name": "../../x.tar", "bytes": 1, "sha256": "", "documents": 1, "tokens": 1}]},
            "not a file name",
        ),
        ({"shards": [{"name": "x.tar", "bytes": -1, "sha256": "", "documents": 1, "tokens": 1}]}, r"\(-1, 1, 1\)"),
        ({"shards": [{"name": "x.tar"}]}, "damaged manifest"),
        ({"surprise": 1}, "damaged manifest"),
        ({"vocab_size": "50257"}, "vocab_size='50257', eot_id=299"),
        ({"eot_id": 300}, "vocab_size=300, eot_id=300"),
        (
            {"shards": [{"name": "x.tar", "bytes": 1, "sha256": "", "documents": 1, "tokens": 10**30}]},
            "tokens = .*10{30}",
        ),
        ({"shards": [{"name": "x.tar", "bytes": 1, "sha256": 5, "documents": 1, "tokens": 1}]}, "sha256 5"),
    ],
)
def test_a_damaged_manifest_is_one_line_that_names_it(tmp_path: Path, change: dict, message: str) -> None:
    write_manifest(manifest(tmp_path))
    body = json.loads((tmp_path / MANIFEST).read_text())
    publish_json(tmp_path / MANIFEST, body | change)
    with pytest.raises(UserError, match=f"manifest.json: .*{message}.*write the shards anew"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"member": 3},
        {"member": "x.y.npy"},
        {"member": "../0.npy"},
        {"crc32": None},
        {"offset": -1},
        {"offset": 1.5},
        {"tokens": True},
        {"tokens": 1 << 60},
    ],
)
def test_a_damaged_index_is_one_line_that_names_it(tmp_path: Path, change: dict) -> None:
    body = {
        "format": 2,
        "blocks": [{"member": "000000.npy", "tokens": 1, "crc32": 1, "offset": 1664}],
        "document_ids": ["a"],
        "document_tokens": [1],
        "shard_sha256": "ab",
    }
    path = tmp_path / "00000.idx.json"
    publish_json(path, body)
    read_index(path)
    publish_json(path, body | {"blocks": [body["blocks"][0] | change]})  # type: ignore[index]
    with pytest.raises(UserError, match=r"00000.idx.json: damaged index .*write the shards anew"):
        read_index(path)
    for wrong in ({"format": 1}, {"surprise": 1}, {"document_tokens": [-1]}, {"blocks": 5}):
        publish_json(path, body | wrong)
        with pytest.raises(UserError, match=r"00000.idx.json: (damaged index|not an index of format 2).*anew"):
            read_index(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"shard_sha256": "cd"}, "of shard sha256 'cd', the manifest says ab"),
        ({"document_tokens": [4, 4]}, "counts other tokens than the manifest's 9"),
        ({"document_ids": ["a"]}, "counts other tokens"),
        ({"blocks": [("000000.npy", 9, 1, 83)]}, "sample 000000.npy: bytes from 83 for 9 tokens, in a shard of 100"),
        ({"blocks": [("000000.npy", 4, 1, 0), ("000001.npy", 5, 1, 7)]}, "sample 000001.npy: bytes from 7 .*ends at 8"),
    ],
)
def test_an_index_is_held_against_the_manifest(tmp_path: Path, change: dict, message: str | None) -> None:
    shard = ShardInfo("00000.tar", 100, "ab", 2, 9)
    source = Manifest(tmp_path, "s", "train", "uint16", 300, 299, "ef", (shard,))
    body = {"blocks": [("000000.npy", 4, 1, 0), ("000001.npy", 5, 1, 8)], "document_ids": ["a", "b"]}
    body |= {"document_tokens": [4, 5], "shard_sha256": "ab"} | change
    write_index(tmp_path / "00000.idx.json", ShardIndex(**body | {"blocks": tuple(Block(*b) for b in body["blocks"])}))
    if message is None:
        assert index_of(source, shard).document_tokens == (4, 5)
        return
    with pytest.raises(UserError, match=rf"00000.idx.json: .*{message}.*write the shards anew"):
        index_of(source, shard)


def test_a_manifest_cannot_say_where_it_comes_from(tmp_path: Path) -> None:
    write_manifest(dataclasses.replace(manifest(tmp_path), origin="http://elsewhere"))
    assert "elsewhere" not in (tmp_path / MANIFEST).read_text()
    for place in ({"origin": "http://elsewhere"}, {"root": "/"}):
        publish_json(tmp_path / MANIFEST, json.loads((tmp_path / MANIFEST).read_text()) | place)
        with pytest.raises(UserError, match="damaged manifest"):
            read_manifest(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, '{"format": 1', "\xff"])
def test_a_file_that_is_no_json_object_is_one_line_that_names_it(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"manifest.json: not (JSON|a JSON object)"):
        read_manifest(tmp_path)
    with pytest.raises(UserError, match=r"no such file or directory: make it with"):
        read_manifest(tmp_path / "nowhere")


def test_a_block_is_a_npy_file_that_numpy_reads() -> None:
    ids = np.array([1, 2, 65535], U2)
    np.testing.assert_array_equal(np.load(io.BytesIO(encode_block(ids)), allow_pickle=False), ids)
    back = decode_block(encode_block(ids), U2)
    np.testing.assert_array_equal(back, ids)
    assert back.dtype == U2


def test_a_block_that_lies_about_itself_is_refused() -> None:
    def npy(array: np.ndarray) -> bytes:
        out = io.BytesIO()
        np.save(out, array, allow_pickle=True)
        return out.getvalue()

    good = encode_block(np.arange(5, dtype=U2))
    huge = good.replace(b"(5,), }    ", b"(5000,), }")
    lies = [
        good[:-1],
        good + b"x",
        huge,
        b"",
        b"PK\x03\x04junk",
        npy(np.array([{"a": 1}], object)),
        npy(np.zeros((2, 2), U2)),
        npy(np.zeros(5, "<u4")),
        npy(np.zeros(5, ">u2")),
    ]
    for lie in lies:
        with pytest.raises(ValueError):
            decode_block(lie, U2)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["fifo", "zeros", "folder"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.json"
    if kind == "fifo":
        os.mkfifo(path)
    if kind == "zeros":
        path.symlink_to("/dev/zero")
    if kind == "folder":
        path.mkdir()
    with pytest.raises(UserError, match=rf"^{path}: (not a regular file|is a directory): do this$") as caught:
        read_json(path, "do this")
    assert not isinstance(caught.value, TransientError)


def test_missing_is_a_mistake_and_unreadable_may_pass(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("{}")
    for path in (tmp_path / "none", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"do this$") as caught:
            read_json(path, "do this")
        assert not isinstance(caught.value, TransientError)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(TransientError, match=rf"^{tmp_path}/loop: too many levels .*: mend it, then try again$"):
        read_json(tmp_path / "loop", "do this")
