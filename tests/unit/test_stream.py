"""Real small tars: what is read is what was written, and every defect is found and named."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import tarfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import stream
from data_pipeline.config import UserError
from data_pipeline.manifest import Manifest, index_path
from data_pipeline.stream import ShardError, ShardStream, read_shard, shard_windows
from tests.fixtures import make_source, random_source

N_CTX = 16


def tokens_of(path: Path) -> np.ndarray:
    """A shard's tokens by tarfile and np.load, [tokens]."""
    with tarfile.open(path) as tar:
        arrays = [np.load(io.BytesIO(tar.extractfile(m).read())) for m in tar if m.name.endswith(".npy")]  # type: ignore[union-attr]
    return np.concatenate(arrays)


def with_bytes(manifest: Manifest, shard: int, data: bytes) -> Manifest:
    """Put other bytes under a shard's name, and a manifest that believes in their number."""
    info = manifest.shards[shard]
    (manifest.root / info.name).write_bytes(data)
    shards = [*manifest.shards]
    shards[shard] = dataclasses.replace(info, bytes=len(data))
    return dataclasses.replace(manifest, shards=tuple(shards))


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_windows_are_slices_of_the_shards_tokens(tmp_path: Path, dtype: str) -> None:
    manifest = random_source(tmp_path, [500, 3, 700, 0, 17, 16], dtype)
    counts = shard_windows(manifest, N_CTX)
    assert counts.tolist() == [31, 0, 43, 0, 1, 0]
    wanted = [(s, w) for s, n in enumerate(counts) for w in range(n)]
    shards, indices = np.random.default_rng(0).permutation(wanted).T
    got = ShardStream(manifest, N_CTX).windows(shards, indices)
    assert got.shape == (75, N_CTX + 1) and got.dtype == np.dtype(dtype)
    for row, s, w in zip(got, shards, indices, strict=True):
        assert row.tolist() == tokens_of(tmp_path / f"{s:05d}.tar")[w * N_CTX : (w + 1) * N_CTX + 1].tolist()


def test_a_long_document_and_ids_above_uint16_come_through(tmp_path: Path) -> None:
    doc = np.arange(70_000, 71_000)
    manifest = make_source(tmp_path, [[doc, doc + 1]], "uint32", vocab_size=80_000)
    assert read_shard(manifest, manifest.shards[0]).tolist() == [*doc, *(doc + 1)]


def test_a_shard_is_read_once_while_it_is_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, reads = random_source(tmp_path, [400] * 4), []

    def spy(manifest: Manifest, shard: stream.ShardInfo) -> np.ndarray:
        reads.append(shard.name[4])
        return read_shard(manifest, shard)

    monkeypatch.setattr(stream, "read_shard", spy)
    two = ShardStream(manifest, N_CTX, open_shards=2)
    for shards in (
        [0, 1],
        [1, 0],
        [2, 1, 2, 1],
        [1, 2],
        [1, 3],
    ):  # two lanes; one goes 0 -> 2 -> 3, the other stays in 1
        two.windows(np.array(shards), np.zeros(len(shards), dtype=int))
    assert reads == ["0", "1", "2", "3"]
    assert len(two._open) == 2


def flip_a_token(path: Path) -> None:
    data, third = bytearray(path.read_bytes()), tokens_of(path)[-3:].tobytes()
    data[data.rindex(third)] ^= 1
    path.write_bytes(data)


def cut_in_the_middle(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def add_a_byte(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def zero_the_tail(path: Path) -> None:  # what a crash leaves of a file whose size was set first
    data = path.read_bytes()
    at = data.index(b"000002.npy")
    path.write_bytes(data[:at] + bytes(len(data) - at))


def drop_a_sample(path: Path) -> None:
    data = path.read_bytes()
    a, b = data.index(b"000001.json"), data.index(b"000002.json")
    path.write_bytes(data[:a] + data[b:] + bytes(b - a))


def swap_two_samples(path: Path) -> None:
    data = path.read_bytes()
    cuts = [data.index(f"00000{n}.json".encode()) for n in (0, 1, 2, 3)]
    parts = [data[a:b] for a, b in pairwise(cuts)]
    path.write_bytes(data[: cuts[0]] + parts[0] + parts[2] + parts[1] + data[cuts[3] :])


def break_a_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(b"000001.npy") + 100] ^= 1
    path.write_bytes(data)


DEFECTS: list[tuple[Callable[[Path], None], str]] = [
    (flip_a_token, r"sample 00000\d.npy: checksum [0-9a-f]{8} where the index says"),
    (cut_in_the_middle, r"truncated, \d+ bytes where the manifest says \d+"),
    (add_a_byte, r"replaced, \d+ bytes where the manifest says \d+"),
    (zero_the_tail, "sample 000002.npy: missing"),
    (drop_a_sample, "sample 000001.npy: missing"),
    (swap_two_samples, "sample 000002.npy: missing"),
    (break_a_header, "sample 000001.npy: missing"),
    (Path.unlink, "No such file or directory"),
]


@pytest.mark.parametrize(("damage", "message"), DEFECTS, ids=lambda x: getattr(x, "__name__", ""))
def test_a_defect_is_found_and_named(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    manifest = random_source(tmp_path, [400, 400])
    damage(tmp_path / "00001.tar")
    whole = ShardStream(manifest, N_CTX)
    whole.windows(np.array([0]), np.array([0]))
    with pytest.raises(ShardError, match=rf"^{tmp_path}/00001.tar: {message}.*verify path=") as caught:
        whole.windows(np.array([0, 1]), np.array([0, 0]))
    assert "\n" not in str(caught.value)


def test_a_shard_replaced_by_another_of_the_same_size_is_found(tmp_path: Path) -> None:
    lengths = [[64, 64, 30]] * 2
    docs = [
        [np.random.default_rng((s, i)).integers(0, 500, n) for i, n in enumerate(ns)] for s, ns in enumerate(lengths)
    ]
    manifest = make_source(tmp_path, docs)
    assert manifest.shards[0].bytes == manifest.shards[1].bytes
    (tmp_path / "00000.tar").write_bytes((tmp_path / "00001.tar").read_bytes())
    with pytest.raises(ShardError, match=r"00000.tar: sample 000000.npy: checksum"):
        read_shard(manifest, manifest.shards[0])


def test_what_is_not_a_tar_is_found_and_never_unpacked(tmp_path: Path) -> None:
    manifest = random_source(tmp_path, [400])
    packed = with_bytes(manifest, 0, gzip.compress((tmp_path / "00000.tar").read_bytes()))
    with pytest.raises(ShardError, match=r"00000.tar: sample \(none\): "):
        read_shard(packed, packed.shards[0])


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.GNUTYPE_SPARSE])
def test_a_member_that_claims_more_than_the_index_is_not_read(tmp_path: Path, kind: bytes) -> None:
    manifest, out = random_source(tmp_path, [400]), io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        member = tarfile.TarInfo("000000.npy")
        member.size, member.type = 1 << 40, kind
        out.write(member.tobuf(tarfile.GNU_FORMAT))
        tar.offset = out.tell()
    crafted = with_bytes(manifest, 0, out.getvalue())
    with pytest.raises(ShardError, match=r"00000.tar: sample 000000.npy: "):
        read_shard(crafted, crafted.shards[0])


@pytest.mark.parametrize("name", ["../secret.tar", "/etc/passwd", "http://localhost/00000.tar", "sub/00000.tar"])
def test_a_manifest_cannot_name_what_is_not_in_its_folder(tmp_path: Path, name: str) -> None:
    manifest = random_source(tmp_path / "source", [400])
    shard = dataclasses.replace(manifest.shards[0], name=name)
    with pytest.raises(ShardError, match=f"shard '{name}' is not the name of a file in that folder"):
        read_shard(manifest, shard)


def test_a_name_that_webdataset_would_run_is_a_file_like_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = random_source(tmp_path, [400])
    expected, shard = (
        read_shard(manifest, manifest.shards[0]),
        dataclasses.replace(manifest.shards[0], name="pipe:touch ran"),
    )
    index_path(manifest, manifest.shards[0]).rename(index_path(manifest, shard))
    (tmp_path / "00000.tar").rename(tmp_path / shard.name)
    monkeypatch.chdir(tmp_path)
    here = dataclasses.replace(manifest, root=Path())
    assert read_shard(here, shard).tolist() == expected.tolist()
    assert not Path("ran").exists()


def test_an_index_that_disagrees_with_the_manifest_is_refused(tmp_path: Path) -> None:
    manifest = random_source(tmp_path, [400])
    shard = dataclasses.replace(manifest.shards[0], tokens=399)
    with pytest.raises(ShardError, match="its index counts other tokens than the manifest's 399"):
        read_shard(manifest, shard)


@pytest.mark.parametrize("tokens", [-64, 10**9, "64", None, 1.5])
def test_a_crafted_index_ends_in_an_error_not_in_memory(tmp_path: Path, tokens: object) -> None:
    manifest = random_source(tmp_path, [400])
    path = index_path(manifest, manifest.shards[0])
    body = json.loads(path.read_text())
    body["blocks"][0]["tokens"] = tokens
    path.write_text(json.dumps(body))
    with pytest.raises(UserError, match=r"00000"):
        read_shard(manifest, manifest.shards[0])


def test_a_crafted_number_of_tokens_takes_no_memory(tmp_path: Path) -> None:
    manifest = random_source(tmp_path, [400])
    path = index_path(manifest, manifest.shards[0])
    body = json.loads(path.read_text())
    body["blocks"][0]["tokens"] += 10**15
    path.write_text(json.dumps(body))
    shard = dataclasses.replace(manifest.shards[0], tokens=400 + 10**15)
    with pytest.raises(ShardError, match="20480 bytes cannot hold the manifest's 1000000000000400 tokens"):
        read_shard(manifest, shard)


def test_a_source_without_a_window_is_refused_with_its_numbers(tmp_path: Path) -> None:
    manifest = random_source(tmp_path, [16, 5])
    with pytest.raises(UserError, match=r"21 tokens in 2 shards, at most 16 in one, hold no window of model.n_ctx=16"):
        shard_windows(manifest, 16)
    assert shard_windows(manifest, 15).tolist() == [1, 0]
