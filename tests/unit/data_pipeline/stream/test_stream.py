"""Real small tars: what is read is what was written, and every defect is found and named."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from conf.errors import TransientError, UserError
from data_pipeline.config import IGNORE
from data_pipeline.manifest import Manifest, index_of, index_path
from data_pipeline.order.plan import Windows
from data_pipeline.remote.source import LostShard, ShardError
from data_pipeline.stream import windows as stream
from data_pipeline.stream.open_shard import LocalShard, OpenShard
from data_pipeline.stream.windows import ShardStream, read_shard, shard_windows
from tests.helpers.fixtures import make_source, random_source
from tests.helpers.ranks import ROOT
from tests.helpers.seeds import seeded

N_CTX = 16


def at(shards: list[int]) -> Windows:
    """The first window of each of these shards of source 0."""
    return Windows(np.zeros(len(shards), np.int64), np.array(shards), np.zeros(len(shards), np.int64))


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


def read(stream: ShardStream, windows: Windows, n_ctx: int = N_CTX, segments: bool = False) -> tuple[np.ndarray, ...]:
    """tokens, labels[, segments] and the crc32 of what `stream` says of the windows."""
    n = len(windows.start)
    tokens, labels = np.full((n, n_ctx), -7, np.int64), np.full((n, n_ctx), -7, np.int64)
    marks = np.full((n, n_ctx), -7, np.int32) if segments else None
    crc = stream.read(windows, n_ctx, tokens, labels, marks)
    return (tokens, labels, *([marks] if segments else []), crc)  # type: ignore[return-value]


def some_windows(manifests: list[Manifest], n: int, n_ctx: int, seed: int) -> Windows:
    """Windows anywhere in the sources, at any token."""
    rng, rows = np.random.default_rng(seed), []
    while len(rows) < n:
        source = int(rng.integers(len(manifests)))
        shard = int(rng.integers(len(manifests[source].shards)))
        if (room := manifests[source].shards[shard].tokens - n_ctx) > 0:
            rows.append((source, shard, int(rng.integers(room))))
    return Windows(*np.array(rows, np.int64).T)


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_windows_are_slices_of_the_shards_tokens(tmp_path: Path, dtype: str) -> None:
    seed = seeded()
    manifests = [
        random_source(tmp_path / "a", [500, 3, 700, 0, 17, 16], dtype, seed),
        random_source(tmp_path / "b", [1000, 900], dtype, seed + 1),
    ]
    whole = [[tokens_of(m.root / s.name) if s.tokens else [] for s in m.shards] for m in manifests]
    stream = ShardStream(manifests, open_shards=2)
    for n_ctx in (1, N_CTX, 100):
        windows = some_windows(manifests, 200, n_ctx, seed)
        tokens, labels, crc = read(stream, windows, n_ctx)
        expected = np.array([whole[s][k][at : at + n_ctx + 1] for s, k, at in zip(*windows, strict=True)])
        np.testing.assert_array_equal(tokens, expected[:, :-1], f"seed {seed}")
        np.testing.assert_array_equal(labels, expected[:, 1:], f"seed {seed}")
        assert crc == zlib.crc32(expected.astype(f"<u{np.dtype(dtype).itemsize}").tobytes()), f"seed {seed}"
        assert len(stream._open) <= 2


def test_the_index_says_where_the_tokens_are(tmp_path: Path) -> None:
    manifest = random_source(tmp_path, [500, 3, 0, 700], "uint32", seed=seeded())
    for shard in manifest.shards:
        body, tokens = (tmp_path / shard.name).read_bytes(), tokens_of(tmp_path / shard.name) if shard.tokens else []
        found = [body[b.offset : b.offset + 4 * b.tokens] for b in index_of(manifest, shard).blocks]
        assert b"".join(found) == np.asarray(tokens, "<u4").tobytes()


def test_a_window_outside_its_shard_is_no_window(tmp_path: Path) -> None:
    stream = ShardStream([random_source(tmp_path, [100])], open_shards=1)
    for start in (-1, 100 - N_CTX, 1000):
        with pytest.raises(IndexError):
            read(stream, Windows(np.array([0]), np.array([0]), np.array([start])))


@pytest.mark.parametrize("longest", [3, 40, 400])
def test_segments_number_the_documents_of_a_window(tmp_path: Path, longest: int) -> None:
    """The twin gives each token its document's number; documents without a token are among them."""
    seed = seeded()
    rng = np.random.default_rng(seed)
    lengths = [rng.integers(0, longest, size=2000 // longest * 2) for _ in range(3)]
    docs = [[rng.integers(0, 50257, n) for n in ns] for ns in lengths]
    manifest = make_source(tmp_path, docs)
    document = [np.repeat(np.arange(len(ns)), ns) for ns in lengths]
    windows = some_windows([manifest], 100, N_CTX, seed)
    plain = read(ShardStream([manifest], open_shards=1), windows)
    tokens, labels, segments, crc = read(ShardStream([manifest], open_shards=1), windows, segments=True)
    np.testing.assert_array_equal(tokens, plain[0])
    assert crc == plain[-1]
    for i, (_, shard, start) in enumerate(zip(*windows, strict=True)):
        own = document[shard][start : start + N_CTX + 1]
        assert segments[i].tolist() == np.unique(own[:-1], return_inverse=True)[1].tolist(), f"seed {seed}"
        expected = np.where(own[1:] == own[:-1], plain[1][i], IGNORE)
        assert labels[i].tolist() == expected.tolist(), f"seed {seed}"


def test_a_long_document_and_ids_above_uint16_come_through(tmp_path: Path) -> None:
    doc = np.arange(70_000, 71_000)
    manifest = make_source(tmp_path, [[doc, doc + 1]], "uint32", vocab_size=80_000)
    assert read_shard(manifest, manifest.shards[0]).tolist() == [*doc, *(doc + 1)]


def test_a_shard_is_opened_once_while_it_is_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, opened = random_source(tmp_path, [400] * 4), []

    def spy(manifest: Manifest, shard: stream.ShardInfo, cache: None) -> OpenShard:
        opened.append(shard.name[4])
        return OpenShard(manifest, shard, cache)

    monkeypatch.setattr(stream, "OpenShard", spy)
    two = ShardStream([manifest], open_shards=2)
    # Two lanes: one goes 0 -> 2 -> 3, the other stays in 1.
    for shards in ([0, 1], [1, 0], [2, 1, 2, 1], [1, 2], [1, 3]):
        read(two, at(shards))
    assert opened == ["0", "1", "2", "3"]
    assert len(two._open) == 2


def test_only_the_blocks_of_a_window_are_read(tmp_path: Path) -> None:
    """Damage elsewhere in the shard is not met: nothing else was read."""
    manifest = random_source(tmp_path, [4000])
    index = index_of(manifest, manifest.shards[0])
    last = index.blocks[-1]
    body = bytearray((tmp_path / "00000.tar").read_bytes())
    body[last.offset] ^= 1
    (tmp_path / "00000.tar").write_bytes(body)
    stream = ShardStream([manifest], open_shards=1)
    end = 4000 - last.tokens
    read(stream, Windows(*np.array([[0, 0, 0], [0, 0, end - N_CTX - 1]]).T))
    with pytest.raises(LostShard, match=f"sample {last.member}: checksum"):
        read(stream, Windows(*np.array([[0, 0, end - N_CTX]]).T))


def test_no_file_stays_open_behind_the_stream(tmp_path: Path) -> None:
    manifest, before = random_source(tmp_path, [400] * 4), len(list(Path("/proc/self/fd").iterdir()))
    stream = ShardStream([manifest], open_shards=4)
    read(stream, at([0, 1, 2, 3]))
    assert len(list(Path("/proc/self/fd").iterdir())) > before
    stream.close()
    stream.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


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


def lose_the_index(path: Path) -> None:
    path.with_suffix(".idx.json").unlink()


def empty_the_index(path: Path) -> None:
    path.with_suffix(".idx.json").write_text("{}")


def exchange_the_index(path: Path) -> None:
    shutil.copy(path.with_name("00000.idx.json"), path.with_suffix(".idx.json"))


DEFECTS: list[tuple[Callable[[Path], None], str]] = [
    (flip_a_token, r"sample 00000\d.npy: checksum [0-9a-f]{8}, the index says"),
    (cut_in_the_middle, r"truncated, \d+ bytes, the manifest says \d+"),
    (add_a_byte, r"replaced, \d+ bytes, the manifest says \d+"),
    (zero_the_tail, "sample 000002.npy: checksum [0-9a-f]{8}, the index says"),
    (drop_a_sample, "sample 000001.npy: checksum [0-9a-f]{8}, the index says"),
    (swap_two_samples, "sample 000001.npy: checksum [0-9a-f]{8}, the index says"),
    (Path.unlink, "No such file or directory"),
    (lose_the_index, r"its index .*00001.idx.json: no such file"),
    (empty_the_index, r"its index .*00001.idx.json: not an index of format 2"),
    (exchange_the_index, "its index .*00001.idx.json: of shard sha256"),
]


@pytest.mark.parametrize(("damage", "message"), DEFECTS, ids=lambda x: getattr(x, "__name__", ""))
def test_a_defect_is_found_and_named(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    manifest = random_source(tmp_path, [400, 400])
    damage(tmp_path / "00001.tar")
    whole = ShardStream([random_source(tmp_path / "other", [400]), manifest], open_shards=1)
    read(whole, at([0])._replace(source=np.array([1])))
    for _ in range(2):  # and again when it is asked for again
        with pytest.raises(LostShard, match=rf"^{tmp_path}/00001.tar: {message}.*verify path=") as caught:
            read(whole, Windows(np.ones(50, int), np.arange(50) % 2, np.arange(50) * 7))
        assert "\n" not in str(caught.value)
        assert (caught.value.source, caught.value.shard) == (1, 1)


def test_a_damaged_header_harms_no_token(tmp_path: Path) -> None:
    manifest = random_source(tmp_path, [400])
    expected = read_shard(manifest, manifest.shards[0])
    break_a_header(tmp_path / "00000.tar")
    assert read_shard(manifest, manifest.shards[0]).tolist() == expected.tolist()


def test_a_shard_cut_while_it_is_in_use_is_found(tmp_path: Path) -> None:
    manifest = random_source(tmp_path, [4000])
    stream = ShardStream([manifest], open_shards=1)
    read(stream, at([0]))
    os.truncate(tmp_path / "00000.tar", 9000)
    with pytest.raises(LostShard, match=r"sample \d+.npy: truncated, \d+ of its \d+ bytes are there"):
        read(stream, Windows(*np.array([[0, 0, 3000]]).T))


@pytest.mark.parametrize("name", ["00000.tar", "00000.idx.json"])
@pytest.mark.parametrize("how", ["link to itself", "no file left", "no memory"])
def test_what_this_machine_cannot_do_retires_no_shard(
    tmp_path: Path, name: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = random_source(tmp_path, [400])
    expected, path = read_shard(manifest, manifest.shards[0]), tmp_path / name
    with monkeypatch.context() as patched:
        if how == "link to itself":
            path.rename(tmp_path / "aside")
            path.symlink_to(name)
        if how == "no file left":
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            os.close(free := os.open(tmp_path, os.O_RDONLY))  # the lowest number that is free
            resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
        if how == "no memory":
            patched.setattr(np, "empty", lambda *_: (_ for _ in ()).throw(MemoryError))
        try:
            with pytest.raises(ShardError, match=rf"^{tmp_path}/00000.tar: [^\n]*$") as caught:
                read_shard(manifest, manifest.shards[0])
        finally:
            if how == "no file left":
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert isinstance(caught.value, TransientError) == (how != "link to itself")
    assert not isinstance(caught.value, LostShard)
    if how == "link to itself":
        (tmp_path / "aside").rename(path)
    assert read_shard(manifest, manifest.shards[0]).tolist() == expected.tolist()


@pytest.mark.parametrize("times", [1, 2])
def test_what_is_not_right_is_read_once_more_before_it_is_lost(
    tmp_path: Path, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, read_it, left = random_source(tmp_path, [400]), os.preadv, [times]
    expected = read_shard(manifest, manifest.shards[0])

    def preadv(fd: int, into: list[memoryview], offset: int) -> int:
        n = read_it(fd, into, offset)
        if left[0]:
            left[0] -= 1
            into[0].cast("B")[0] ^= 1
        return n

    monkeypatch.setattr(os, "preadv", preadv)
    if times == 1:
        assert read_shard(manifest, manifest.shards[0]).tolist() == expected.tolist()
    else:
        with pytest.raises(LostShard, match="checksum"):
            read_shard(manifest, manifest.shards[0])
    assert not left[0]


def test_a_stream_that_is_closed_opens_nothing(tmp_path: Path) -> None:
    stream = ShardStream([random_source(tmp_path, [400])], open_shards=1)
    before = len(list(Path("/proc/self/fd").iterdir()))
    read(stream, at([0]))
    stream.close()
    with pytest.raises(RuntimeError, match="closed"):
        read(stream, at([0]))
    stream.expect(at([0]), N_CTX)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_shard_closed_by_two_threads_closes_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, closed = random_source(tmp_path, [400]), []
    shard = LocalShard(manifest, manifest.shards[0])
    fd = shard._fd

    def close(number: int) -> None:
        closed.append(number)
        if len(closed) == 1:
            shard.close()  # the other thread, in the midst of it

    with monkeypatch.context() as patched:
        patched.setattr(os, "close", close)
        shard.close()
    os.close(fd)
    assert closed == [fd]


LIMITS = """
import resource, sys
from conf.errors import UserError
from data_pipeline.stream.open_shard import room_for_files
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[2])))
try:
    room_for_files(int(sys.argv[3]), 2)
    print(resource.getrlimit(resource.RLIMIT_NOFILE))
except UserError as e:
    print(e)
"""


@pytest.mark.parametrize(
    ("soft", "hard", "shards", "says"),
    [
        (1024, 4096, 10, "(1024, 4096)"),
        (1024, 4096, 320, "(1536, 4096)"),
        (256, 300, 22, "(300, 300)"),
        (256, 300, 23, "23 open shards (lanes of a rank x sources) of 2 files each and 256 other files are more than "),
    ],
)
def test_files_for_all_shards_are_asked_of_the_system_or_refused(soft: int, hard: int, shards: int, says: str) -> None:
    args = [sys.executable, "-c", LIMITS, str(soft), str(hard), str(shards)]
    out = subprocess.run(args, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.startswith(says) and ("ulimit -n" in out) == (shards == 23)


def test_a_shard_and_its_index_replaced_together_are_found(tmp_path: Path) -> None:
    """The same sizes, counts and checksums that fit: only the manifest knows that it is another shard."""
    lengths = [64, 64, 30]
    docs = [np.arange(n) + i for i, n in enumerate(lengths)]
    manifest = make_source(tmp_path / "a", [docs])
    other = make_source(tmp_path / "b", [[d + 1 for d in docs]])
    for name in ("00000.tar", "00000.idx.json"):
        shutil.copy(other.root / name, manifest.root / name)
    with pytest.raises(LostShard, match=r"its index .*: of shard sha256"):
        read_shard(manifest, manifest.shards[0])


def test_a_fifo_in_a_shards_place_does_not_wait(tmp_path: Path) -> None:
    manifest = random_source(tmp_path, [400])
    (tmp_path / "00000.tar").unlink()
    os.mkfifo(tmp_path / "00000.tar")
    with pytest.raises(LostShard, match=r"00000.tar: truncated, 0 bytes"):
        read_shard(manifest, manifest.shards[0])


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


def test_what_is_packed_is_never_unpacked(tmp_path: Path) -> None:
    manifest = random_source(tmp_path, [400])
    packed = with_bytes(manifest, 0, gzip.compress((tmp_path / "00000.tar").read_bytes()))
    with pytest.raises(LostShard, match=r"00000.tar: its index .*: sample 000000.npy: bytes from"):
        read_shard(packed, packed.shards[0])


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.GNUTYPE_SPARSE])
def test_a_member_that_claims_more_than_the_index_is_not_read(tmp_path: Path, kind: bytes) -> None:
    manifest, out = random_source(tmp_path, [400]), io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        member = tarfile.TarInfo("000000.npy")
        member.size, member.type = 1 << 40, kind
        out.write(member.tobuf(tarfile.GNU_FORMAT))
        tar.offset = out.tell()
    crafted = with_bytes(manifest, 0, out.getvalue().ljust(manifest.shards[0].bytes, b"\0"))
    with pytest.raises(LostShard, match=r"00000.tar: sample 000000.npy: checksum"):
        read_shard(crafted, crafted.shards[0])


@pytest.mark.parametrize("name", ["../secret.tar", "/etc/passwd", "http://localhost/00000.tar", "sub/00000.tar"])
def test_a_manifest_cannot_name_what_is_not_in_its_folder(tmp_path: Path, name: str) -> None:
    manifest = random_source(tmp_path / "source", [400])
    shard = dataclasses.replace(manifest.shards[0], name=name)
    with pytest.raises(ShardError, match=f"shard '{name}' is not the name of a file in that folder"):
        read_shard(manifest, shard)


def test_a_name_that_webdataset_would_run_is_only_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that webdataset would run as a command is a file like any other."""
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


@pytest.mark.parametrize("offset", [-1, 0, 10**9, "1536", None, 1.5])
def test_an_index_that_points_elsewhere_is_refused(tmp_path: Path, offset: object) -> None:
    manifest = random_source(tmp_path, [400])
    path = index_path(manifest, manifest.shards[0])
    body = json.loads(path.read_text())
    body["blocks"][1]["offset"] = offset
    path.write_text(json.dumps(body))
    with pytest.raises(LostShard, match=r"00000.tar: its index .*(blocks\[1\]\.offset|000001.npy)"):
        read_shard(manifest, manifest.shards[0])


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
    body["blocks"][0]["tokens"] += 2 * 10**14
    body["document_tokens"][0] += 2 * 10**14
    path.write_text(json.dumps(body))
    shard = dataclasses.replace(manifest.shards[0], tokens=400 + 2 * 10**14)
    with pytest.raises(ShardError, match="20480 bytes cannot hold the manifest's 200000000000400 tokens"):
        read_shard(manifest, shard)


def test_a_source_without_a_window_is_refused_with_its_numbers(tmp_path: Path) -> None:
    manifest = random_source(tmp_path, [16, 5])
    with pytest.raises(UserError, match=r"21 tokens in 2 shards, at most 16 in one, hold no window of model.n_ctx=16"):
        shard_windows(manifest, 16)
    assert shard_windows(manifest, 15).tolist() == [1, 0]
