"""Sources that lie afar: the tokens are the shards' own, whatever the place, the disk and the other processes do."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path

import fsspec
import numpy as np
import pytest

from conf.errors import TransientError, UserError
from data_pipeline.config import CacheConfig, FetchConfig
from data_pipeline.manifest import Manifest, ShardInfo, index_of
from data_pipeline.order.plan import Windows
from data_pipeline.remote import cached_shard as entry
from data_pipeline.remote import fetch
from data_pipeline.remote.cache import Cache, CacheFull
from data_pipeline.remote.prefetch import Prefetcher
from data_pipeline.remote.source import LostShard, ShardError, index_at, open_source
from data_pipeline.stream.windows import ShardStream, read_shard
from tests.helpers.fixtures import random_source
from tests.helpers.http_server import Server, serving, wait_for
from tests.helpers.ranks import ROOT
from tests.helpers.seeds import seeded
from tests.unit.data_pipeline.stream.test_stream import read, some_windows

pytestmark = pytest.mark.timeout(60)  # nothing may hang
N_CTX = 16
QUICK = FetchConfig(timeout_s=1.0, retries=2)
TOKENS = [4000, 3000, 5000]


@pytest.fixture
def local(tmp_path: Path) -> Manifest:
    return random_source(tmp_path / "there", TOKENS, seed=seeded())


@pytest.fixture
def server(local: Manifest) -> Iterator[Server]:
    with serving(local.root) as server:
        yield server


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "sleep", lambda s: time.sleep(s / 50))


def cache_in(folder: Path, limit_bytes: int = 1 << 30, cfg: FetchConfig = QUICK) -> Cache:
    return Cache(CacheConfig(str(folder / "cache"), limit_bytes / 2**30), cfg, allow_pipe=True)


def stream_of(url: str, cache: Cache, open_shards: int = 3) -> ShardStream:
    return ShardStream([open_source(url, cache)], open_shards=open_shards, cache=cache)


def window(shard: int, start: int = 0) -> Windows:
    return Windows(np.array([0]), np.array([shard]), np.array([start]))


def every_window(shard: int) -> Windows:
    """All blocks are in them, so that a stream has read the whole shard."""
    starts = [*range(0, TOKENS[shard] - N_CTX, N_CTX), TOKENS[shard] - N_CTX - 1]
    return Windows(np.zeros(len(starts), int), np.full(len(starts), shard), np.array(starts))


def first_block(local: Manifest, shard: int = 0) -> str:
    """The range of a shard's first block as a request writes it."""
    block = index_of(local, local.shards[shard]).blocks[0]
    return f"bytes={block.offset}-{block.offset + 2 * block.tokens - 1}"


@pytest.mark.parametrize("kind", ["http", "http without ranges", "memory", "pipe"])
def test_any_place_gives_the_windows_of_the_local_shards(local: Manifest, tmp_path: Path, kind: str) -> None:
    seed = seeded()
    with serving(local.root, ranges=kind == "http") as server:
        url = {"memory": f"memory://{seed}", "pipe": f"pipe:cat {local.root}/{{}}"}.get(kind, server.url)
        if kind == "memory":
            for path in local.root.iterdir():
                with fsspec.open(f"{url}/{path.name}", "wb") as f:
                    f.write(path.read_bytes())
        cache = cache_in(tmp_path)
        manifest = open_source(url, cache)
        assert (manifest.origin, manifest.shards, manifest.sha256) == (url, local.shards, local.sha256)
        assert (manifest.root / "tokenizer.json").read_bytes() == (local.root / "tokenizer.json").read_bytes()
        for _ in range(2):  # the second time out of the cache
            there, here = ShardStream([manifest], open_shards=2, cache=cache), ShardStream([local], open_shards=3)
            for n in range(4):
                windows = some_windows([local], 50, N_CTX, seed + n)
                for a, b in zip(read(there, windows, segments=True), read(here, windows, segments=True), strict=True):
                    np.testing.assert_array_equal(a, b, f"seed {seed}")
            there.close()
        wanted = [s.name for s in local.shards]
        if kind == "http":
            assert max(max(times_asked(server, local, shard)) for shard in local.shards) == 1
        if kind == "http without ranges":
            assert [server.asked(name) for name in wanted] == [1, 1, 1]


def test_resuming_fetches_only_the_blocks_of_its_windows(local: Manifest, server: Server, tmp_path: Path) -> None:
    """Resuming fetches the blocks of its windows, not whole shards."""
    stream = stream_of(server.url, cache_in(tmp_path))
    read(stream, window(0))
    assert server.requests[-1] == ("00000.tar", first_block(local))
    assert Counter(name for name, _ in server.requests) == dict.fromkeys(
        ("manifest.json", "tokenizer.json", "00000.idx.json", "00000.tar"), 1
    )


PASSING = ["500", "hang", "dribble", "cut", "flip", "dribbled headers", "429", "404"]


@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_passes_costs_no_token(local: Manifest, server: Server, tmp_path: Path, fault: str) -> None:
    stream = stream_of(server.url, cache_in(tmp_path))
    for name in ("00001.tar", "00001.idx.json"):
        server.faults[name] = iter([fault])
    got, expected = read(stream, window(1, 5)), read(ShardStream([local], open_shards=1), window(1, 5))
    np.testing.assert_array_equal(got[0], expected[0])
    assert server.asked("00001.tar") >= 2 <= server.asked("00001.idx.json")


LOST = {
    "404": "HTTP 404",
    "410": "HTTP 410",
    "flip": r"sample 000000.npy: checksum [0-9a-f]{8}, the index says [0-9a-f]{8}; fetched again it was no better",
}


@pytest.mark.parametrize("fault", LOST)
def test_what_is_lost_for_good_is_named_with_its_numbers(server: Server, tmp_path: Path, fault: str) -> None:
    stream = stream_of(server.url, cache_in(tmp_path))
    server.always("00001.tar", fault)
    with pytest.raises(LostShard, match=rf"^{server.url}/00001.tar: {LOST[fault]}: .*on_bad_shard=skip") as caught:
        read(stream, window(1))
    assert (caught.value.source, caught.value.shard) == (0, 1)
    read(stream, window(2))  # the others are there


@pytest.mark.parametrize("without", [False, True])
@pytest.mark.parametrize("kind", ["truncated", "replaced"])
def test_a_shard_of_another_size_is_lost(local: Manifest, tmp_path: Path, kind: str, without: bool) -> None:
    path = local.root / "00001.tar"
    body = path.read_bytes()
    path.write_bytes(body[:-512] if kind == "truncated" else body + b"\0")
    with serving(local.root, ranges=not without) as server:
        message = rf"{kind}, \d+ bytes, the manifest says {len(body)}; fetched again it was no better"
        with pytest.raises(LostShard, match=rf"00001.tar: {message}"):
            read(stream_of(server.url, cache_in(tmp_path)), window(1))


def test_a_shard_cut_short_behind_a_command_or_fsspec_is_lost(local: Manifest, tmp_path: Path) -> None:
    (local.root / "00001.tar").write_bytes((local.root / "00001.tar").read_bytes()[:1700])
    for url in (f"pipe:cat {local.root}/{{}}", f"file://{local.root}"):
        with pytest.raises(LostShard, match=r"00001.tar: sample 000000.npy: truncated, \d+ of its \d+ bytes"):
            read(stream_of(url, cache_in(tmp_path)), window(1))


def test_a_replaced_shard_is_lost(local: Manifest, server: Server, tmp_path: Path) -> None:
    """A shard replaced under its name is lost; the old tokens in the cache stay those of the old shard."""
    cache = cache_in(tmp_path)
    stream = stream_of(server.url, cache)
    before = read(stream, window(0))[0]
    other = random_source(tmp_path / "other", TOKENS, seed=seeded())
    for path in other.root.iterdir():
        if path.name != "manifest.json":
            (local.root / path.name).write_bytes(path.read_bytes())
    with pytest.raises(LostShard, match=r"00001.tar: its index 00001.idx.json: of shard sha256 '[0-9a-f]{64}'"):
        read(stream, window(1))
    (local.root / "manifest.json").write_bytes((other.root / "manifest.json").read_bytes())
    again = stream_of(server.url, cache)  # the next start of the run reads the new manifest
    np.testing.assert_array_equal(read(again, window(0))[0], read(ShardStream([other], open_shards=1), window(0))[0])
    assert (read(stream, window(0))[0] == before).all()


def test_a_place_that_is_gone_as_a_whole_is_no_lost_shard(local: Manifest, server: Server, tmp_path: Path) -> None:
    """on_bad_shard=skip must not retire shard after shard of a bucket that was renamed."""
    stream = stream_of(server.url, cache_in(tmp_path))
    local.root.rename(tmp_path / "elsewhere")
    with pytest.raises(
        ShardError, match=r"00001.tar: HTTP 404, and the source's manifest.json is missing too"
    ) as caught:
        read(stream, window(1))
    assert not isinstance(caught.value, LostShard)
    with pytest.raises(ShardError, match=r"00001.tar: .*and the source's manifest.json is missing too") as caught:
        read(ShardStream([local], open_shards=1), window(1))
    assert not isinstance(caught.value, LostShard)


STAYING = {"500": "HTTP 500; tried 3 times", "hang": "(0 bytes in|.*timed out).*; tried 3 times", "dribble": "bytes in"}


@pytest.mark.parametrize("fault", STAYING)
def test_an_unreachable_source_is_not_a_lost_shard(server: Server, tmp_path: Path, fault: str) -> None:
    """A source that cannot be reached stops the run and is not taken for a lost shard."""
    stream = stream_of(server.url, cache_in(tmp_path))
    server.always("00001.tar", fault)
    with pytest.raises(ShardError, match=rf"^{server.url}/00001.tar: .*{STAYING[fault]}.*data.fetch.retries") as caught:
        read(stream, window(1))
    assert isinstance(caught.value, TransientError) and not isinstance(caught.value, LostShard)
    assert "\n" not in str(caught.value)
    server.faults.clear()
    read(stream, window(1))  # and once it can, it can


@pytest.mark.parametrize(
    ("name", "fault", "message"),
    [
        ("manifest.json", "404", "HTTP 404: no source there"),
        ("manifest.json", "500", "HTTP 500; tried 3 times"),
        ("tokenizer.json", "flip", "tokenizer.json has sha256 [0-9a-f]{64}, the manifest says [0-9a-f]{64}"),
        ("00000.idx.json", "404", "HTTP 404"),
        ("00000.idx.json", "flip", "its index 00000.idx.json: not JSON"),
    ],
)
def test_a_small_file_that_is_missing_or_wrong_is_named(
    server: Server, tmp_path: Path, name: str, fault: str, message: str
) -> None:
    server.always(name, fault)
    with pytest.raises(UserError, match=rf"^{server.url}.*{message}"):
        read(stream_of(server.url, cache_in(tmp_path)), window(0))


def test_a_place_afar_without_a_cache_is_refused_with_the_knob(server: Server) -> None:
    with pytest.raises(UserError, match=r"data.cache.dir=FOLDER"):
        open_source(f"{server.url}?sig=secret", None)
    with pytest.raises(UserError, match=r"^http://h/x: its URL holds a user or a password"):
        open_source("http://me:secret@h/x", None)
    with pytest.raises(UserError, match=r"data.cache.dir=FOLDER"):
        Cache(CacheConfig(), QUICK)


def times_asked(server: Server, local: Manifest, shard: ShardInfo) -> list[int]:
    """How many requests each block of a shard was in."""
    got = [r.removeprefix("bytes=").split("-") for name, r in server.requests if name == shard.name]
    return [sum(int(a) <= block.offset <= int(b) for a, b in got) for block in index_of(local, shard).blocks]


def room_for(local: Manifest, *shards: int) -> int:
    """Bytes of these shards' entries, to the byte."""
    indexes = [index_of(local, local.shards[s]) for s in shards]
    files = sum((local.root / f"{s:05d}.idx.json").stat().st_size for s in shards)
    return files + sum(2 * TOKENS[s] + len(index.blocks) for s, index in zip(shards, indexes, strict=True))


def entries(cache: Cache) -> set[str]:
    return {p.name for p in (cache.dir / "shards").iterdir()}


def test_a_block_damaged_in_the_cache_is_fetched_anew_and_told(
    local: Manifest, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = cache_in(tmp_path)
    expected = read(stream_of(server.url, cache), window(0))
    tokens = cache.dir / "shards" / local.shards[0].sha256 / "tokens"
    body = bytearray(tokens.read_bytes())
    body[3] ^= 4
    tokens.write_bytes(body)
    (cache.dir / "shards" / local.shards[0].sha256 / "index.json").write_text("{}")
    got = read(stream_of(server.url, cache_in(tmp_path)), window(0))
    np.testing.assert_array_equal(got[0], expected[0])
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "block 000000.npy of 00000.tar is damaged in the cache: fetched again" in said
    assert server.requests.count(("00000.tar", first_block(local))) == 2 == server.asked("00000.idx.json")


def test_the_cache_evicts_the_least_recently_used(
    local: Manifest, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache keeps to its limit; the least recently used shard goes."""
    monkeypatch.setattr(ShardStream, "expect", lambda *_: None)  # letting go counts as use, and who reads ahead lets go
    limit = max(room_for(local, 0, 1), room_for(local, 0, 2), room_for(local, 1, 2))  # when it likes
    cache = cache_in(tmp_path, limit)
    stream = stream_of(server.url, cache, open_shards=1)
    names = [s.sha256 for s in local.shards]
    for shards, left in (([0], {0}), ([0, 1], {0, 1}), ([0], {0, 1}), ([2], {0, 2}), ([1], {1, 2})):
        for shard in shards:
            whole = every_window(shard)
            read(stream, whole)
            assert sum(f.stat().st_size for f in (cache.dir / "shards").rglob("*") if f.is_file()) <= limit
        assert entries(cache) == {names[i] for i in left}, shards


def test_shards_in_use_are_not_evicted(local: Manifest, server: Server, tmp_path: Path) -> None:
    """A shard in use is not evicted, and a cache without room is one clear error."""
    limit = room_for(local, 0, 1)
    cache = cache_in(tmp_path, limit)
    mine, other = stream_of(server.url, cache, open_shards=2), stream_of(server.url, cache_in(tmp_path, limit))
    read(mine, window(0))
    read(mine, window(1))
    message = (
        rf"^data.cache.dir={cache.dir}: data.cache.limit_gib=\S+ is {limit} bytes, \d+ are in use and \d+ more are"
    )
    with pytest.raises(CacheFull, match=rf"{message} needed for one shard: give a larger data.cache.limit_gib$"):
        read(other, window(2, 3))
    assert {local.shards[0].sha256, local.shards[1].sha256} <= entries(cache)
    mine.close()
    read(other, window(2, 3))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "small disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=56k", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here ({mounted.stderr.decode().strip()})")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_evicts_then_stops(local: Manifest, server: Server, small_disk: Path) -> None:
    """A full disk evicts every unused shard, then stops the run, without a wrong token."""
    cache = cache_in(small_disk)
    stream, here = stream_of(server.url, cache, open_shards=1), ShardStream([local], open_shards=3)
    for shard in (0, 1, 2, 0, 1, 2):  # each 2 or 3 pages of tokens, 3 or 4 of its index, 1 each of the small files
        whole = every_window(shard)
        np.testing.assert_array_equal(read(stream, whole)[0], read(here, whole)[0])
    asked = [times_asked(server, local, shard) for shard in local.shards]
    assert all(map(all, asked)) and max(map(max, asked)) > 1  # what was evicted was fetched again
    with cache._locked():
        while cache._evict():
            pass
    free = os.statvfs(small_disk)
    (small_disk / "other").write_bytes(bytes((free.f_bavail - 6) * free.f_bsize))  # room for one shard
    held = stream_of(server.url, cache_in(small_disk), open_shards=3)
    with pytest.raises(CacheFull, match=r"No space left on device, \d+ bytes of the cache are there, all in use"):
        for shard in range(3):
            read(held, window(shard))
    held.close()
    held = stream_of(server.url, cache_in(small_disk), open_shards=3)
    (small_disk / "other").unlink()
    np.testing.assert_array_equal(read(held, window(2))[0], read(here, window(2))[0])


RANK = """
import json, sys, time
import numpy as np
from data_pipeline.remote.cache import Cache
from data_pipeline.config import CacheConfig, FetchConfig
from data_pipeline.order.plan import Windows
from data_pipeline.remote.source import open_source
from data_pipeline.stream.windows import ShardStream
url, folder, seed, timeout = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
cache = Cache(CacheConfig(folder), FetchConfig(timeout_s=timeout, retries=2))
manifest = open_source(url, cache)
stream = ShardStream([manifest], open_shards=3, cache=cache)
rows = [(0, s, at) for s, i in enumerate(manifest.shards) for at in range(0, i.tokens - 16, 16)]
rows = np.random.default_rng(seed).permutation(rows)
tokens, labels = np.empty((1, 16), np.int64), np.empty((1, 16), np.int64)
print(json.dumps([[*map(int, row), stream.read(Windows(*row[:, None]), 16, tokens, labels)] for row in rows]))
"""


def start_rank(server: Server, tmp_path: Path, seed: int, timeout_s: float = 5.0) -> subprocess.Popen[str]:
    args = [sys.executable, "-c", RANK, server.url, str(tmp_path / "cache"), str(seed), str(timeout_s)]
    return subprocess.Popen(args, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def is_right(rank: subprocess.Popen[str], local: Manifest) -> None:
    """The rank ended well, and its windows are those of the local shards."""
    out, _ = rank.communicate(timeout=50)
    assert rank.returncode == 0
    here = ShardStream([local], open_shards=3)
    rows = json.loads(out)
    assert len(rows) > 700
    for *row, crc in rows:
        assert read(here, Windows(*np.array([row]).T))[-1] == crc


@pytest.mark.parametrize("ranges", [True, False])
def test_the_ranks_of_a_node_fetch_each_block_once(local: Manifest, tmp_path: Path, ranges: bool) -> None:
    seed = seeded()
    with serving(local.root, ranges) as server:
        server.delay = 0.005  # so that they meet
        for rank in [start_rank(server, tmp_path, seed + i) for i in range(3)]:
            is_right(rank, local)
        for shard in local.shards:
            assert server.asked(shard.name.replace(".tar", ".idx.json")) == 1, f"seed {seed}"
            if ranges:
                assert max(times_asked(server, local, shard)) == 1, f"seed {seed}, {shard.name}"
            else:
                assert server.asked(shard.name) == 1, f"seed {seed}, {shard.name}"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_killed_or_stopped_in_mid_fetch_holds_nobody_up(
    local: Manifest, server: Server, tmp_path: Path, how: signal.Signals
) -> None:
    server.faults["00001.tar"] = iter(["hang"])
    first = start_rank(server, tmp_path, 0, timeout_s=60.0)
    wait_for(lambda: server.asked("00001.tar") > 0)
    os.kill(first.pid, how)
    is_right(start_rank(server, tmp_path, 1, timeout_s=0.5), local)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()


def test_what_is_expected_is_there_before_it_is_read(local: Manifest, server: Server, tmp_path: Path) -> None:
    cache = cache_in(tmp_path)
    stream, seed = stream_of(server.url, cache), seeded()
    windows = some_windows([local], 30, N_CTX, seed)
    stream.expect(windows, N_CTX)
    prefetcher = stream.prefetcher
    assert prefetcher is not None
    wait_for(lambda: not prefetcher.pending)
    before = [*server.requests]
    got, expected = read(stream, windows), read(ShardStream([local], open_shards=3), windows)
    np.testing.assert_array_equal(got[0], expected[0], f"seed {seed}")
    assert server.requests == before
    assert len([r for r in before if r[0].endswith(".tar")]) < sum(len(index_of(local, s).blocks) for s in local.shards)
    stream.expect(windows, N_CTX)  # all loaded: nothing to do
    assert not prefetcher.pending
    stream.close()


def test_no_hint_is_dropped_however_many_there_are(local: Manifest, server: Server, tmp_path: Path) -> None:
    cache = cache_in(tmp_path)
    manifest, prefetcher = open_source(server.url, cache), Prefetcher(cache)
    server.delay = 0.01
    starts = [(n, start) for n in range(3) for start in range(0, TOKENS[n] - N_CTX, N_CTX)]
    for n, start in starts:
        prefetcher.want(manifest, manifest.shards[n], [start], N_CTX + 1)
    wait_for(lambda: not prefetcher.pending)
    prefetcher.close()
    before = [*server.requests]
    stream = ShardStream([manifest], open_shards=3, cache=cache)
    read(stream, Windows(np.zeros(len(starts), int), *np.array(starts).T))
    stream.close()
    assert server.requests == before and len(starts) > 700


def test_reading_ahead_ends_though_it_is_asked_for_more(server: Server, tmp_path: Path) -> None:
    cache = cache_in(tmp_path)
    manifest, before = open_source(server.url, cache), {*threading.enumerate()}
    prefetcher = Prefetcher(cache)
    mine = {*threading.enumerate()} - before
    server.always("00000.tar", "hang")
    for _ in range(100):
        prefetcher.want(manifest, manifest.shards[0], [0], N_CTX + 1)
    prefetcher.close()
    for _ in range(100):
        prefetcher.want(manifest, manifest.shards[0], [0], N_CTX + 1)
        prefetcher.stop(0.0)
        prefetcher.close()
    wait_for(lambda: not any(thread.is_alive() for thread in mine if thread.name == "prefetch"))


def test_a_shard_in_the_cache_has_two_files_open(server: Server, tmp_path: Path) -> None:
    cache = cache_in(tmp_path)
    manifest = open_source(server.url, cache)
    shard = entry.CachedShard(cache, manifest, manifest.shards[0])
    shard.obtain(0, 1)
    files = [str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert sum(name.startswith(f"{tmp_path}/cache/shards/") for name in files) == 2, files
    shard.close()


@pytest.mark.parametrize("name", ["tokens", "index.json"])
def test_a_failing_disk_of_the_cache_is_named(
    local: Manifest, server: Server, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk of the cache that fails is named, and its files stay."""
    cache = cache_in(tmp_path)
    read(stream_of(server.url, cache), window(0))
    path, asked = cache.dir / "shards" / local.shards[0].sha256 / name, len(server.requests)
    real = os.open

    def failing(file: object, flags: int, *mode: int) -> int:
        if str(file) == str(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(file))
        return real(file, flags, *mode)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", failing)
        message = rf"00000.tar: data.cache.dir={cache.dir}: Input/output error \({path}\)"
        with pytest.raises(ShardError, match=message) as caught:
            read(stream_of(server.url, cache_in(tmp_path)), window(0))
    assert isinstance(caught.value, TransientError) and not isinstance(caught.value, LostShard)
    read(stream_of(server.url, cache_in(tmp_path)), window(0))
    assert {name for name, _ in server.requests[asked:]} <= {"manifest.json", "tokenizer.json"}


def total_of(cache: Cache) -> tuple[int, int]:
    """What the cache says of its bytes, and what they are."""
    files = [f.stat().st_size for f in (cache.dir / "shards").rglob("*") if f.is_file()]
    return int((cache.dir / "lock").read_text() or -1), sum(files)


def test_the_running_total_is_what_is_there(local: Manifest, server: Server, tmp_path: Path) -> None:
    limit = max(room_for(local, 0, 1), room_for(local, 0, 2), room_for(local, 1, 2))
    first, second = cache_in(tmp_path, limit), cache_in(tmp_path, limit)
    for n in (0, 1, 2, 0, 2, 1):
        for cache in (first, second):
            stream = stream_of(server.url, cache, open_shards=1)
            read(stream, window(n))
            stream.close()
            said, there = total_of(cache)
            assert said == there <= limit
    (first.dir / "lock").write_text("")  # as a process leaves it that is killed
    index_at(open_source(server.url, first), 0, first)
    assert total_of(first)[0] in (-1, total_of(first)[1])
    shutil.rmtree(first.dir / "shards")  # by hand
    (first.dir / "shards").mkdir()
    for n in range(3):
        stream = stream_of(server.url, second, open_shards=1)
        read(stream, window(n))
        stream.close()


def test_an_index_costs_the_same_in_a_full_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cost of an index does not grow with the number of shards in the cache."""
    local = random_source(tmp_path / "there", [40] * 30)
    looked, scandir = [], os.scandir
    cache = cache_in(tmp_path)
    manifest = open_source(f"pipe:cat {local.root}/{{}}", cache)
    monkeypatch.setattr(os, "scandir", lambda path: looked.append(path) or scandir(path))
    for n in range(30):
        index_at(manifest, n, cache)
    assert len(looked) <= 2, looked


def test_as_many_indexes_are_kept_parsed_as_shards_are_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = random_source(tmp_path / "there", [400] * 40)
    cache, parsed = cache_in(tmp_path), []
    stream = stream_of(f"pipe:cat {local.root}/{{}}", cache, open_shards=40)
    monkeypatch.setattr(entry, "index_of", lambda *args: parsed.append(1) or index_of(*args))
    for _ in range(2):
        for n in range(40):
            index_at(stream._manifests[0], n, cache)
    assert len(parsed) == 40
    stream.close()


def test_errors_of_reading_ahead_are_the_readers_to_meet(server: Server, tmp_path: Path) -> None:
    stream = stream_of(server.url, cache_in(tmp_path))
    server.faults["00001.tar"] = repeat("404")
    stream.expect(Windows(*np.array([[0, 1, 0], [0, 0, 0]]).T), N_CTX)
    read(stream, window(0))
    with pytest.raises(LostShard, match="HTTP 404"):
        read(stream, window(1))
    stream.close()


def test_reading_ahead_makes_room_for_the_reader(local: Manifest, server: Server, tmp_path: Path) -> None:
    """A cache with room for two shards, both held by reading ahead at a server that answers late."""
    limit = max(room_for(local, 0, 1), room_for(local, 2))
    cache = cache_in(tmp_path, limit, FetchConfig(timeout_s=5.0, retries=2))
    stream = stream_of(server.url, cache, open_shards=1)
    server.delay = 0.3
    stream.expect(Windows(*np.array([[0, 0, 0], [0, 1, 0]]).T), N_CTX)
    wait_for(lambda: server.asked("00000.tar") > 0 and server.asked("00001.tar") > 0)
    np.testing.assert_array_equal(read(stream, window(2))[0], read(ShardStream([local], open_shards=1), window(2))[0])
    stream.close()


def test_closing_does_not_wait_for_a_dead_source(server: Server, tmp_path: Path) -> None:
    """Closing does not wait for a dead source, and frees the shards in the cache."""
    cache = cache_in(tmp_path)
    stream = stream_of(server.url, cache)
    read(stream, window(0))
    server.always("00001.tar", "hang")
    stream.expect(window(1), N_CTX)
    wait_for(lambda: server.asked("00001.tar") > 0)
    stream.close()
    stream.close()

    def evicted() -> bool:
        with cache._locked():
            return cache._evict()

    wait_for(evicted, 5)


def test_a_whole_shard_comes_through_the_cache(local: Manifest, server: Server, tmp_path: Path) -> None:
    cache = cache_in(tmp_path)
    manifest = open_source(server.url, cache)
    for shard in local.shards:
        assert read_shard(manifest, shard, cache).tolist() == read_shard(local, shard).tolist()


def test_a_folder_of_others_is_no_cache_and_stays(local: Manifest, server: Server, tmp_path: Path) -> None:
    """The user's own FOLDER/shards/corpusA, given as data.cache.dir=FOLDER."""
    theirs = tmp_path / "cache" / "shards" / "corpusA" / "00000.tar"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("years")
    with pytest.raises(UserError, match=r"holds files and no \.gradus-cache.*: give an empty data\.cache\.dir"):
        cache_in(tmp_path)
    assert sorted(p.name for p in (tmp_path / "cache").rglob("*")) == ["00000.tar", "corpusA", "shards"]


def test_files_of_others_in_a_cache_are_never_removed(local: Manifest, server: Server, tmp_path: Path) -> None:
    """Put there later: beside the shards, in one of them, and under a name like one."""
    cache = cache_in(tmp_path, max(room_for(local, s) for s in range(3)))
    stream = stream_of(server.url, cache, open_shards=1)
    read(stream, every_window(0))
    shards = cache.dir / "shards"
    theirs = [shards / "corpusA" / "00000.tar", shards / local.shards[0].sha256 / "notes", shards / ("0" * 63) / "use"]
    for path in theirs:
        path.parent.mkdir(exist_ok=True)
        path.write_text("years" * 1000)
    for shard in (1, 2, 1):
        read(stream, every_window(shard))
    assert all(path.read_text() == "years" * 1000 for path in theirs)
    assert not (shards / local.shards[0].sha256 / "tokens").exists(), "the limit did not hold for the cache's own files"
