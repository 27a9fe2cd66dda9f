"""Inputs by URL: whole, of the size that the place says, fetched once, all of one version."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import fsspec
import pytest

from conf.errors import TransientError, UserError
from data_pipeline.config import FetchConfig
from data_pipeline.corpus import remote_inputs as away
from data_pipeline.corpus.inputs import files_at
from data_pipeline.corpus.remote_inputs import fetched, inputs_at
from tests.helpers.http_server import Server, serving

QUICK = FetchConfig(timeout_s=1.0, retries=2)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "there").mkdir()
    with serving(tmp_path / "there") as made:
        yield made


def test_a_url_is_fetched_whole_in_pieces_and_once(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(away, "PIECE", 10_000)
    body = os.urandom(64_321)
    (server.folder / "a.jsonl.gz").write_bytes(body)
    (file,) = inputs_at(f"{server.url}/a.jsonl.gz")
    copies = [fetched(file, tmp_path / "cache", QUICK) for _ in range(2)]
    assert copies[0] == copies[1] and copies[0].path.read_bytes() == body
    assert (copies[0].name, copies[0].size, copies[0].url) == ("a.jsonl.gz", len(body), None)
    assert copies[0].path.name.endswith("-a.jsonl.gz")
    assert server.asked("a.jsonl.gz") == 7
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [copies[0].path.name]


@pytest.mark.parametrize("left", [0, 30_000, 64_321, 70_000])
@pytest.mark.parametrize("fault", ["cut", "500", ""])
def test_what_a_kill_left_is_fetched_anew_and_not_glued_to(
    server: Server, tmp_path: Path, fault: str, left: int
) -> None:
    body = os.urandom(64_321)
    (server.folder / "a").write_bytes(body)
    (file,) = inputs_at(f"{server.url}/a")
    target = fetched(file, tmp_path / "cache", QUICK).path
    target.unlink()
    target.with_name(f".{target.name}.part").write_bytes(os.urandom(left))  # of an earlier version
    server.requests.clear()
    server.faults["a"] = iter([fault])
    assert fetched(file, tmp_path / "cache", QUICK).path.read_bytes() == body
    assert server.requests[0] == ("a", f"bytes=0-{away.PIECE - 1}")


def test_a_file_that_changes_between_two_pieces_is_refused(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(away, "PIECE", 10_000)

    def then_touched(piece: Callable[[], int], _: FetchConfig) -> int:
        total = piece()
        os.utime(server.folder / "a", ns=(1, 1))
        return total

    monkeypatch.setattr(away, "retried", then_touched)
    (server.folder / "a").write_bytes(os.urandom(64_321))
    (file,) = inputs_at(f"{server.url}/a")
    with pytest.raises(UserError, match="a: it changed while it was fetched: run the same command again"):
        fetched(file, tmp_path / "cache", QUICK)
    monkeypatch.undo()
    assert fetched(file, tmp_path / "cache", QUICK).path.read_bytes() == (server.folder / "a").read_bytes()


@pytest.mark.parametrize("name", ["a b.jsonl", "é.jsonl", "-100%25.jsonl", "x=1;y&z.jsonl", f"{'long' * 50}.jsonl"])
def test_any_name_is_fetched_and_its_copy_keeps_the_ending(server: Server, tmp_path: Path, name: str) -> None:
    body = os.urandom(1000)
    (server.folder / name).write_bytes(body)
    (file,) = inputs_at(f"{server.url}/{quote(name)}")
    copy = fetched(file, tmp_path / "cache", QUICK)
    assert file.name == copy.name == name and copy.path.read_bytes() == body and copy.path.suffix == ".jsonl"
    where, fs = f"/{secrets.token_hex(4)} é", fsspec.filesystem("memory")
    fs.pipe_file(f"{where}/é/{name}", body)
    (file,) = inputs_at(f"memory:/{where}")
    assert file.name == name
    copy = fetched(file, tmp_path / "cache")
    assert copy.path.read_bytes() == body and copy.path.suffix == ".jsonl"


def test_a_url_is_asked_for_as_it_is_spelled(server: Server, tmp_path: Path) -> None:
    (server.folder / "x").mkdir()
    (server.folder / "x" / "b c.jsonl").write_bytes(b"{}")
    (file,) = inputs_at(f"{server.url}/x%2Fb%20c.jsonl")
    copy = fetched(file, tmp_path / "cache", QUICK).path
    assert copy.read_bytes() == b"{}" and copy.name.endswith("-x_b_c.jsonl")
    assert server.paths[-1] == "/x%2Fb%20c.jsonl"
    with pytest.raises(UserError, match=r"input=.*: names no file"):
        inputs_at(f"{server.url}/x/")


def test_a_server_without_ranges_gives_the_same_file(tmp_path: Path) -> None:
    body = os.urandom(200_000)
    (tmp_path / "a").write_bytes(body)
    with serving(tmp_path, ranges=False) as server:
        server.faults["a"] = iter(["cut"])
        (file,) = inputs_at(f"{server.url}/a")
        assert fetched(file, tmp_path / "cache", QUICK).path.read_bytes() == body


def test_what_cannot_be_had_is_one_line_that_names_it(server: Server, tmp_path: Path) -> None:
    (file,) = inputs_at(f"{server.url}/a?key=secret")
    with pytest.raises(UserError, match=rf"^{server.url}/a: HTTP 404$"):
        fetched(file, tmp_path / "cache", QUICK)
    (server.folder / "a").write_bytes(b"x" * 1000)
    server.always("a", "500")
    with pytest.raises(TransientError, match=rf"^{server.url}/a: HTTP 500; tried 3 times$"):
        fetched(file, tmp_path / "cache", QUICK)
    server.always("a", "no length")
    with pytest.raises(TransientError, match=rf"^{server.url}/a: the answer ended at byte 500"):
        fetched(file, tmp_path / "cache", QUICK)
    for url, line in {"pipe:cat {}": "a command does not say", "http://me:pw@x.org/a": "a user or a password"}.items():
        with pytest.raises(UserError, match=line):
            inputs_at(url)


def test_fsspec_inputs_are_listed_with_their_sizes(tmp_path: Path) -> None:
    """A folder, a glob and a file of fsspec's."""
    where, fs = f"/{secrets.token_hex(4)}", fsspec.filesystem("memory")
    files = {f"{where}/x/b.warc.gz": os.urandom(3000), f"{where}/x/y/a.warc.gz": b"a", f"{where}/z.txt": b""}
    for path, body in files.items():
        fs.pipe_file(path, body)
    for url, names in {
        f"memory:/{where}": ["x/b.warc.gz", "x/y/a.warc.gz", "z.txt"],
        f"memory:/{where}/x/*.warc.gz": ["b.warc.gz"],
        f"memory:/{where}/**/*.warc.gz": ["b.warc.gz", "y/a.warc.gz"],
        f"memory:/{where}/z.txt": ["z.txt"],
        f"memory:/{where}/nothing/*": [],
    }.items():
        found = inputs_at(url)
        assert [f.name for f in found] == names
        for file in found:
            body = next(body for path, body in files.items() if path.endswith(file.name))
            assert file.size == len(body)
            assert fetched(file, tmp_path / "cache").path.read_bytes() == body


def test_files_of_others_beside_the_copies_stay(server: Server, tmp_path: Path) -> None:
    (server.folder / "a").write_bytes(b"ours")
    theirs = [tmp_path / "cache" / name for name in ("a", ".a.part", "notes-a", ".notes-a.part")]
    (tmp_path / "cache").mkdir()
    for path in theirs:
        path.write_text("years")
    (file,) = inputs_at(f"{server.url}/a")
    copy = fetched(file, tmp_path / "cache", QUICK).path
    assert copy.read_bytes() == b"ours" and {*copy.parent.iterdir()} == {*theirs, copy}
    assert all(path.read_text() == "years" for path in theirs)


def test_a_path_is_what_it_was(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (file,) = inputs_at(str(tmp_path))
    assert [file] == files_at(str(tmp_path)) and fetched(file, tmp_path / "cache") is file
    assert not (tmp_path / "cache").exists()
