"""Bytes from real places that misbehave: what comes is right, or the fault is named, and nothing waits for ever."""

from __future__ import annotations

import errno
import os
import resource
import secrets
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from conf.errors import UserError
from data_pipeline.config import FetchConfig
from data_pipeline.remote import fetch
from data_pipeline.remote.backends import (
    Backend,
    Corrupt,
    Fsspec,
    Lost,
    Unreachable,
    backend_of,
    is_remote,
    refuse_password,
    shown,
)
from data_pipeline.remote.fetch import Reader, fetch_small, retried
from tests.helpers.http_server import Server, serving

pytestmark = pytest.mark.timeout(30)  # nothing may hang
NORMAL = FetchConfig(timeout_s=20.0, retries=2)
QUICK, PATIENT = FetchConfig(timeout_s=0.2, retries=2), FetchConfig(timeout_s=0.2, retries=8)  # where it is waited for
BODY = secrets.token_bytes(300_000)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.tar").write_bytes(BODY)
    return tmp_path


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    with serving(folder) as server:
        yield server


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waits: list[float] = []
    monkeypatch.setattr(fetch, "sleep", waits.append)
    return waits


def read(there: Backend, start: int, length: int, name: str = "a.tar", cfg: FetchConfig = NORMAL) -> bytes:
    """[start, start + length) as the cache reads it."""

    def once() -> bytes:
        with Reader(there, name, start, length, cfg.timeout_s) as reader:
            reader.skip(start - reader.start)
            return reader.take(length)

    return retried(once, cfg)


def test_a_range_is_asked_for_and_nothing_else_is_sent(server: Server) -> None:
    there = backend_of(server.url, NORMAL)
    assert read(there, 1000, 70_000) == BODY[1000:71_000]
    assert server.requests == [("a.tar", "bytes=1000-70999")] and there.ranged
    with Reader(there, "a.tar", 5, 10, 1.0) as reader:
        assert (reader.start, reader.total, reader.take(99)) == (5, len(BODY), BODY[5:15])


def test_a_server_without_ranges_gives_the_same_bytes(folder: Path) -> None:
    with serving(folder, ranges=False) as server:
        there = backend_of(server.url, NORMAL)
        assert read(there, 1000, 70_000) == BODY[1000:71_000] and there.ranged is False


def test_one_connection_serves_many_reads(server: Server) -> None:
    there = backend_of(server.url, NORMAL)
    for at in range(0, 100_000, 10_000):
        assert read(there, at, 10_000) == BODY[at : at + 10_000]
    assert there._pool.connection_from_url(server.url).num_connections <= 2  # type: ignore[attr-defined]


@pytest.mark.parametrize("fault", ["500", "503", "429", "cut", "hang", "dribble", "dribbled headers", "no length"])
def test_a_fault_that_passes_costs_a_wait_and_no_byte(server: Server, fault: str, short_waits: list[float]) -> None:
    server.faults["a.tar"] = iter([fault] * 2)
    assert read(backend_of(server.url, QUICK), 1000, 70_000, cfg=PATIENT) == BODY[1000:71_000]
    assert server.asked("a.tar") >= 3  # more where this machine was slow
    first, second, *_ = short_waits
    assert 0.125 <= first <= 0.25 <= second <= 0.5


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("500", "HTTP 500"),
        ("403", "HTTP 403"),
        ("hang", "0 bytes in 0.2 s|timed out"),
        ("cut", r"IncompleteRead|35000 bytes"),
        ("dribble", r"\d bytes in 0.2 s"),
        ("dribbled headers", "0 bytes in 0.2 s"),
        ("no length", "the answer ended at byte 36000, bytes up to 71000 were requested"),
    ],
)
def test_a_lasting_fault_ends_with_its_cause_and_tries(server: Server, fault: str, cause: str) -> None:
    """A fault that stays ends in an error with its cause and the number of tries."""
    server.always("a.tar", fault)
    cfg = QUICK if "0.2 s" in cause else NORMAL
    with pytest.raises(Unreachable, match=f"({cause}).*; tried 3 times"):
        read(backend_of(server.url, cfg), 1000, 70_000, cfg=cfg)
    assert server.asked("a.tar") == 3


def test_a_slow_server_is_no_dead_one(server: Server, folder: Path) -> None:
    """1 MiB must come in every timeout_s, not the whole file."""
    body = secrets.token_bytes(4 << 20)
    (folder / "long.tar").write_bytes(body)
    server.always("long.tar", "slow")
    cfg = FetchConfig(timeout_s=1.0, retries=0)
    with Reader(backend_of(server.url, cfg), "long.tar", 0, len(body), cfg.timeout_s) as reader:
        assert reader.take(len(body)) == body


@pytest.mark.parametrize("status", ["404", "410"])
def test_what_is_gone_is_lost_at_once(server: Server, status: str) -> None:
    server.always("a.tar", status)
    with pytest.raises(Lost, match=f"HTTP {status}"):
        read(backend_of(server.url, NORMAL), 0, 10)
    assert server.asked("a.tar") == 1


def test_a_byte_behind_the_end_is_wrong(server: Server) -> None:
    with pytest.raises(Corrupt, match=f"truncated: the server has no byte {len(BODY)}"):
        read(backend_of(server.url, NORMAL), len(BODY), 10)


def test_an_endless_body_is_read_only_as_far_as_it_was_asked_for(server: Server) -> None:
    server.always("a.tar", "endless")
    there = backend_of(server.url, NORMAL)
    assert read(there, 1000, 70_000) == BODY[1000:71_000]
    with pytest.raises(Lost, match="more than 400000 bytes"):
        fetch_small(there, "a.tar", 400_000, NORMAL)


def test_a_small_file_is_whole_or_an_error(server: Server) -> None:
    there = backend_of(server.url, NORMAL)
    assert fetch_small(there, "a.tar", len(BODY), NORMAL) == BODY
    with pytest.raises(Lost, match=f"more than {len(BODY) - 1} bytes"):
        fetch_small(there, "a.tar", len(BODY) - 1, NORMAL)
    server.always("a.tar", "cut")
    with pytest.raises(Unreachable):
        fetch_small(there, "a.tar", len(BODY), NORMAL)


def test_a_redirect_is_followed_and_a_circle_of_them_is_not(server: Server, folder: Path) -> None:
    (folder / "b.tar").write_bytes(BODY)
    server.always("b.tar", f"to {server.url}/a.tar")
    there = backend_of(server.url, NORMAL)
    assert read(there, 5, 10, "b.tar") == BODY[5:15]
    server.always("a.tar", f"to {server.url}/b.tar")
    with pytest.raises(Unreachable, match="too many redirects"):
        read(there, 5, 10, "b.tar")


def test_nobody_at_the_other_end_is_named(server: Server) -> None:
    with serving(Path()) as gone:
        there = backend_of(gone.url, NORMAL)
    with pytest.raises(Unreachable, match=r"refused.*; tried 3 times"):
        read(there, 0, 10)
    with pytest.raises(Unreachable, match=r"nowhere\.invalid"):
        read(backend_of("http://nowhere.invalid/x", NORMAL), 0, 10)


def test_a_query_is_sent_and_never_shown(server: Server) -> None:
    there = backend_of(server.url + "/?token=hidden", NORMAL)
    assert there.url == server.url + "/"
    assert read(there, 0, 10) == BODY[:10]
    assert server.requests == [("a.tar?token=hidden", "bytes=0-9")]
    there = backend_of(server.url + "/?token=hidden", QUICK)
    for fault in ("500", "hang", "cut", f"to {server.url}/a.tar?token=hidden"):
        server.always("a.tar", fault)
        with pytest.raises(Unreachable) as caught:
            read(there, 0, 10, cfg=QUICK)
        assert "hidden" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://me:secret@h/x?sig=secret#secret", "https://h/x"),
        ("https://me:sec@ret@h?sig=secret", "https://h"),
        ("https://h/me@x", "https://h/me@x"),
        ("s3://key:secret@bucket/x", "s3://bucket/x"),
        ("quux://key:secret@h/x", "quux://h/x"),
        ("pipe:curl -H 'Token: secret' http://h/{}", "pipe:curl ... {}"),
        ("pipe:curl -H 'secret", "pipe:curl ..."),
        ("pipe:curl -u secret http://h/", "pipe:curl ..."),
    ],
)
def test_messages_name_a_place_without_its_secrets(url: str, name: str) -> None:
    assert shown(url) == name
    try:
        there = backend_of(url, NORMAL).url
    except UserError as e:
        there = str(e).replace("{}, the file's", "")
    assert there.startswith(name) and "secret" not in there


def test_a_password_in_a_url_is_refused() -> None:
    for url in (
        "http://me:secret@h/x",
        "https://token@h/x",
        "sftp://u:secret@h",
        "s3://u:sec@ret@b/x",
        "http://u:@h?a",
    ):
        with pytest.raises(UserError, match=r"^[a-z0-9]+://[hb]\S*: its URL holds .*pipe:COMMAND") as caught:
            refuse_password(url)
        assert "secret" not in str(caught.value) and "token" not in str(caught.value)
    for url in ("http://h/me:x@y", "http://h?a=b:c@d", "abfs://box@account/x", "pipe:ssh a:b@c {}", "sftp://me@h/x"):
        refuse_password(url)


def test_a_command_works_behind_a_thousand_open_files(folder: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2048:
        pytest.skip(f"a process may open {hard} files here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        assert read(backend_of(f"pipe:cat {folder}/{{}}", NORMAL), 1000, 70_000) == BODY[1000:71_000]
    finally:
        for fd in files:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("name", ["../a.tar", "/etc/passwd", "-n", "a b", "a;b", "", "a/b", "%2e%2e", "a?b", "$(id)"])
def test_a_name_that_is_more_than_a_name_is_refused_everywhere(folder: Path, name: str) -> None:
    for url in ("http://127.0.0.1:1", "memory://x", f"pipe:cat {folder}/{{}}"):
        with pytest.raises(Lost, match="is not the plain name of a file"):
            read(backend_of(url, NORMAL), 0, 1, name)


def test_fsspec_places_are_read_by_range() -> None:
    where = f"memory://{secrets.token_hex(4)}"
    with fsspec.open(f"{where}/a.tar", "wb") as f:
        f.write(BODY)
    there = backend_of(where, NORMAL)
    assert read(there, 1000, 70_000) == BODY[1000:71_000]
    assert fetch_small(there, "a.tar", len(BODY), NORMAL) == BODY
    assert read(there, len(BODY) - 5, 10) == BODY[-5:]
    with pytest.raises(Lost, match="more than 9 bytes"):
        fetch_small(there, "a.tar", 9, NORMAL)
    with pytest.raises(Lost, match="no such file"):
        read(there, 0, 10, "b.tar")


class Versioned(MemoryFileSystem):
    """As s3fs: the second argument is a version, and a range behind the end is refused."""

    def cat_file(self, path: str, version_id: str | None = None, start: int = 0, end: int = 0) -> bytes:
        assert version_id is None
        if start >= self.info(path)["size"]:
            raise OSError(errno.EINVAL, "The requested range is not satisfiable")
        return super().cat_file(path, start, end)


def test_a_range_of_fsspec_is_asked_for_by_name() -> None:
    there = Fsspec(f"memory://{secrets.token_hex(4)}")
    there.filesystem = Versioned()
    there.filesystem.pipe_file(f"{there.root}/a.tar", BODY)
    assert read(there, 1000, 70_000) == BODY[1000:71_000]
    with pytest.raises(Corrupt, match=f"truncated: it ends at byte {len(BODY)}"):
        read(there, len(BODY), 10)


def test_a_kind_of_place_that_nobody_knows_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match=r"^quux://x: .*quux"):
        backend_of("quux://x", NORMAL)
    for template in ("pipe:", "pipe:cat x", "pipe:cat '{}", "pipe:{}"):
        with pytest.raises(UserError, match=r"^pipe:"):
            backend_of(template, NORMAL)


def test_a_command_gives_the_bytes_and_no_shell_reads_it(folder: Path) -> None:
    there = backend_of(f"pipe:cat '{folder}/{{}}'", NORMAL)
    assert read(there, 1000, 70_000) == BODY[1000:71_000]
    there = backend_of(f"pipe:cat {folder}/{{}} ; touch {folder}/ran $(touch {folder}/ran)", NORMAL)
    with pytest.raises(Unreachable, match=r"exit code 1: .*No such file"):
        read(there, 1000, len(BODY))
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    ("command", "cause"),
    [
        ("sh -c 'echo the cause >&2; exit 7' {}", "exit code 7: the cause"),
        ("no-such-command {}", "no-such-command: No such file"),
        ("sleep 60.{}", "invalid time interval"),
        ("sh -c 'sleep 61' {}", "0 bytes in 0.2 s|no output and no end in 0.2 s"),
        ("sh -c 'while sleep 0.05; do printf x; done' {}", r"\d bytes in 0.2 s"),
        ("sh -c 'head -c 900 /dev/zero; exec 1>&-; sleep 62' {}", "bytes in 0.2 s|no output and no end in 0.2 s"),
    ],
)
def test_a_bad_command_is_named_and_ended(command: str, cause: str) -> None:
    """A command that fails, hangs or dribbles is named and ended."""
    cfg = QUICK if "0.2 s" in cause else NORMAL
    with pytest.raises(Unreachable, match=f"({cause}).*; tried 3 times"):
        read(backend_of(f"pipe:{command}", cfg), 0, 1000, cfg=cfg)
    end = time.monotonic() + 10
    while subprocess.run(["pgrep", "-f", "^sleep 6[0-9]"], capture_output=True, check=False).stdout:
        assert time.monotonic() < end, "a command outlived its reader"
        time.sleep(0.05)


def test_what_is_remote() -> None:
    assert [is_remote(p) for p in ("data/x", "/data", "s3://b", "http://h", "pipe:cat {}", "C:x")] == [
        False,
        False,
        True,
        True,
        True,
        False,
    ]


@pytest.mark.parametrize(("kind", "times"), [(Unreachable, 3), (Lost, 1), (Corrupt, 1)])
def test_only_what_may_pass_is_tried_again(kind: type[Exception], times: int) -> None:
    tries = []

    def once() -> None:
        tries.append(1)
        raise kind("x")

    with pytest.raises(kind):
        retried(once, NORMAL)
    assert len(tries) == times


def test_any_number_of_tries_waits_half_a_minute_at_most(short_waits: list[float]) -> None:
    def once() -> None:
        raise Unreachable("x")

    with pytest.raises(Unreachable, match="tried 1501 times"):
        retried(once, FetchConfig(retries=1500))
    assert 15 <= max(short_waits) <= 30 and len(short_waits) == 1500


def test_what_is_gone_is_asked_for_once_more(server: Server) -> None:
    server.faults["a.tar"] = iter(["404"])
    assert fetch_small(backend_of(server.url, NORMAL), "a.tar", len(BODY), NORMAL) == BODY
    server.always("a.tar", "404")
    with pytest.raises(Lost, match="HTTP 404"):
        fetch_small(backend_of(server.url, NORMAL), "a.tar", len(BODY), NORMAL)
    assert server.asked("a.tar") == 4
