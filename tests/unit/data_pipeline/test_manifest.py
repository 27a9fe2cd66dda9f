"""The manifest and the index: what is written is read back, and damage is named, never followed."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest

from conf.errors import TransientError, UserError
from data_pipeline.files import from_json, publish_json, read_json
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
            r"shards\[0\].name=.*not a file name",
        ),
        (
            {"shards": [{"name": "x.tar", "bytes": -1, "sha256": "", "documents": 1, "tokens": 1}]},
            r"shards\[0\].bytes=-1, not 0 to",
        ),
        ({"shards": [{"name": "x.tar"}]}, r"shards\[0\].bytes, shards\[0\].documents, .*: missing"),
        ({"surprise": 1}, "damaged .surprise: not known."),
        ({"vocab_size": "50257"}, "vocab_size='50257', not int"),
        ({"eot_id": 300}, "vocab_size=300, eot_id=300"),
        (
            {"shards": [{"name": "x.tar", "bytes": 1, "sha256": "", "documents": 1, "tokens": 10**30}]},
            r"shards\[0\].tokens=10{30}, not 0 to",
        ),
        ({"shards": [{"name": "x.tar", "bytes": 1, "sha256": 5, "documents": 1, "tokens": 1}]}, "sha256=5, not str"),
    ],
)
def test_a_damaged_manifest_is_one_line_that_names_it(tmp_path: Path, change: dict, message: str) -> None:
    write_manifest(manifest(tmp_path))
    body = json.loads((tmp_path / MANIFEST).read_text())
    publish_json(tmp_path / MANIFEST, body | change)
    with pytest.raises(UserError, match=f"manifest.json: .*{message}.*write the shards again"):
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
    with pytest.raises(UserError, match=r"00000.idx.json: damaged \(blocks\[0\].*write the shards again"):
        read_index(path)
    for wrong in ({"format": 1}, {"surprise": 1}, {"document_tokens": [-1]}, {"blocks": 5}):
        publish_json(path, body | wrong)
        with pytest.raises(UserError, match=r"00000.idx.json: (damaged|not an index of format 2).*again"):
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
    with pytest.raises(UserError, match=rf"00000.idx.json: .*{message}.*write the shards again"):
        index_of(source, shard)


def test_a_manifest_cannot_say_where_it_comes_from(tmp_path: Path) -> None:
    write_manifest(dataclasses.replace(manifest(tmp_path), origin="http://elsewhere"))
    assert "elsewhere" not in (tmp_path / MANIFEST).read_text()
    for place in ({"origin": "http://elsewhere"}, {"root": "/"}):
        publish_json(tmp_path / MANIFEST, json.loads((tmp_path / MANIFEST).read_text()) | place)
        with pytest.raises(UserError, match=r"damaged \(origin(, root)?: not known\)"):
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


def test_missing_and_linked_to_itself_are_mistakes(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("{}")
    for path in (tmp_path / "none", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"do this$") as caught:
            read_json(path, "do this")
        assert not isinstance(caught.value, TransientError)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match=rf"^{tmp_path}/loop: too many levels .*: fix it, then try again$") as caught:
        read_json(tmp_path / "loop", "do this")
    assert not isinstance(caught.value, TransientError)


@dataclasses.dataclass(frozen=True)
class Leaf:
    number: Annotated[int, range(1, 9)]
    word: Annotated[str, re.compile("[a-z]+"), "a word"] = "x"


@dataclasses.dataclass(frozen=True)
class Tree:
    root: Path
    leaves: tuple[Leaf, ...]
    by_name: dict[str, list[float]]
    counts: tuple[Annotated[int, range(10)], ...] = ()
    free: Any = None
    maybe: bool | None = None

    def __post_init__(self) -> None:
        if len(self.counts) > 3:
            raise ValueError(f"counts: {len(self.counts)}, more than 3")


def tree(extra: bool = False, **changes: Any) -> Tree:
    body = {"leaves": [{"number": 1}], "by_name": {"a": [1, 2.5]}} | changes
    return from_json(
        Tree, {k: v for k, v in body.items() if v != "LEFT OUT"}, "f.json", "fix it", extra=extra, root=Path("r")
    )


def test_json_becomes_its_dataclass() -> None:
    """Nested values, defaults and what the caller gives arrive with their types; a whole number is a float too."""
    made = tree(counts=[1, 2], free={"any": [None]}, maybe=False)
    assert made == Tree(Path("r"), (Leaf(1),), {"a": [1.0, 2.5]}, (1, 2), {"any": [None]}, False)
    assert type(made.by_name["a"][0]) is float
    assert tree(extra=True, more=1, leaves=[{"number": 2, "more": 3}]).leaves == (Leaf(2),)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"leaves": "LEFT OUT"}, "leaves: missing"),
        ({"more": 1}, "more: not known"),
        ({"root": "r"}, "root: not known"),
        ({"leaves": {}}, "leaves={}, not list"),
        ({"leaves": [{"number": 1}, {"number": 9}]}, r"leaves\[1\].number=9, not 1 to 8"),
        ({"leaves": [{"number": True}]}, r"leaves\[0\].number=True, not int"),
        ({"leaves": [{"number": 1.0}]}, r"leaves\[0\].number=1.0, not int"),
        ({"leaves": [{"number": 1, "word": "A"}]}, r"leaves\[0\].word='A', not a word"),
        ({"leaves": [3]}, r"leaves\[0\]=3, not dict"),
        ({"by_name": {"a": ["1"]}}, r"by_name.a\[0\]='1', not float"),
        ({"counts": [1, 2, 10]}, r"counts\[2\]=10, not 0 to 9"),
        ({"counts": [1, -1]}, r"counts\[1\]=-1, not 0 to 9"),
        ({"counts": [1, True]}, r"counts\[1\]=True, not int"),
        ({"counts": [1, 1, 1, 1]}, "counts: 4, more than 3"),
        ({"maybe": 1}, "maybe=1, not bool"),
        ({"by_name": ["long"] * 99}, "by_name=a list, not dict"),
    ],
)
def test_json_of_another_form_is_named(changes: dict, message: str) -> None:
    """The message names the file, the field down to its index, the value and the cure."""
    with pytest.raises(UserError, match=rf"^f.json: damaged \({message}\): fix it$"):
        tree(**changes)
    with pytest.raises(UserError, match=r"^f.json: damaged \(the whole=\[\], not dict\): fix it$"):
        from_json(Tree, [], "f.json", "fix it")
