"""docs/safety.md: every place that removes or overwrites, each with its proof, and strangers' files in its way."""

from __future__ import annotations

import ast
import re
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from conf.errors import UserError
from data_pipeline.files import own_folder, publish, remove_unfinished
from data_pipeline.prepare.run import hold_to
from data_pipeline.shards.copies import small_files
from tests.helpers.ranks import free_port
from trainer.checkpoint.claim import refuse_strangers
from trainer.diagnostics.machine import write_speed
from trainer.diagnostics.node_check import shared_folder
from trainer.diagnostics.node_store import Meeting
from trainer.distributed.world import World
from trainer.health.hang_report import Spot, publish_report, write_stacks
from trainer.run.folder import RunFolder
from trainer.run.heartbeat import Heartbeat, write_heartbeat

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/safety.md").read_text(encoding="utf-8")
ROWS = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.splitlines() if line.startswith("| `")]


def removals(source: str) -> Iterator[list[str]]:
    """The names of the functions and classes around each call that removes, renames over or cuts a file."""

    def visit(node: ast.AST, around: list[str]) -> Iterator[list[str]]:
        for child in ast.iter_child_nodes(node):
            named = isinstance(child, ast.FunctionDef | ast.ClassDef)
            if isinstance(child, ast.Call) and takes_place(child):
                yield around
            yield from visit(child, [*around, child.name] if named else around)  # type: ignore[attr-defined]

    yield from visit(ast.parse(source), [])


def takes_place(call: ast.Call) -> bool:
    """True if a call can remove a file, move it, or empty one that is there."""
    owner = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else ast.unparse(call.func)
    one = len(call.args) == 1 and not call.keywords  # a path's, not a text's or a dataclass's
    if name in ("replace", "rename", "remove"):
        return owner == "os" or (one and name != "remove")
    if name in ("move", "copy", "copy2", "copyfile", "copytree"):
        return owner == "shutil"
    if name == "open" and "os.devnull" not in owner:
        modes = [a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        return "O_TRUNC" in ast.unparse(call) or any(re.fullmatch(r"[rwab+t]*[w+][rwab+t]*", mode) for mode in modes)
    return name in ("rmtree", "unlink", "rmdir", "removedirs", "truncate", "ftruncate", "write_text", "write_bytes")


TAKING = """
p.unlink()
a.rename(b)
os.replace(a, b)
os.remove(a)
shutil.move(a, b)
open(a, "wb")
p.open("w")
p.open("r+b")
p.write_text("x")
os.open(p, os.O_WRONLY | os.O_TRUNC)
"""
LEAVING = """
"a".replace("b", "c")
replace(row, step=1)
items.remove(x)
p.open("x")
p.open("ab")
p.open()
open(a, "rb")
os.open(p, os.O_CREAT | os.O_EXCL)
"""


def test_every_removal_in_the_code_has_its_proof() -> None:
    for line in TAKING.split("\n")[1:-1]:
        assert list(removals(f"def f():\n {line}")) == [["f"]], line
    for line in LEAVING.split("\n")[1:-1]:
        assert list(removals(f"def f():\n {line}")) == [], line
    known = {words[0]: set() for words in (re.findall(r"`([^`]+)`", row[0]) for row in ROWS)}  # type: ignore[var-annotated]
    for row in ROWS:
        file, *functions = re.findall(r"`([^`]+)`", row[0])
        known[file] |= set(functions)
    for package in ("conf", "data_pipeline", "launch", "trainer"):
        for path in sorted((ROOT / package).rglob("*.py")):
            file = path.relative_to(ROOT).as_posix()
            for around in removals(path.read_text(encoding="utf-8")):
                assert known.get(file, set()) & set(around), f"{file} {'.'.join(around)} is not in docs/safety.md"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].split("`")[1].rpartition("/")[2])
def test_every_proof_names_code_and_a_test_that_are_there(row: list[str]) -> None:
    file, *functions = re.findall(r"`([^`]+)`", row[0])
    source = (ROOT / file).read_text(encoding="utf-8")
    assert all(re.search(rf"(def|class) {name}\b", source) for name in functions), row[0]
    path, _, name = row[3].strip("`").partition("::")
    assert name.startswith("test_") and f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), row[3]


def test_only_own_unfinished_files_are_removed(tmp_path: Path) -> None:
    ours, theirs = (".a.json.77.tmp", ".a.json.tmp"), (".notes.tmp", ".a.json.tmp.old", ".b.json.77.tmp", "a.json")
    for name in (*ours, *theirs):
        (tmp_path / name).write_text("x")
    (tmp_path / ".a.json.78.tmp").mkdir()
    remove_unfinished(tmp_path, r"a\.json")
    assert {path.name for path in tmp_path.iterdir()} == {*theirs, ".a.json.78.tmp"}


def test_a_folder_of_others_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_text("years")
    with pytest.raises(UserError, match=r"holds files and no \.gradus-demo, so it is no demo of ours to clean: move"):
        own_folder(tmp_path, "demo", "move them away")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]
    own_folder(tmp_path / "new", "demo", "")
    publish(tmp_path / "new" / "x", b"")
    own_folder(tmp_path / "new", "demo", "")


def test_an_output_that_others_began_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "links.jsonl.zst").write_text("years")
    with pytest.raises(UserError, match="not empty, and not begun by this command: give a new folder"):
        hold_to(tmp_path / "plan.json", {"version": "1"})
    (tmp_path / "plan.json").write_text('{"version": "theirs"}')
    with pytest.raises(UserError, match="was begun with version=theirs, now version=1"):
        hold_to(tmp_path / "plan.json", {"version": "1"})
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "links.jsonl.zst": "years",
        "plan.json": '{"version": "theirs"}',
    }


def test_copies_of_a_remote_source_leave_files_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    where = f"/{secrets.token_hex(4)}"
    fsspec.filesystem("memory").pipe_file(f"{where}/manifest.json", b"ours")
    (tmp_path / "manifest.json").write_text("years")
    with small_files(f"memory:/{where}") as made:
        assert (made / "manifest.json").read_bytes() == b"ours" and made.parent == tmp_path
    assert [path.read_text() for path in tmp_path.iterdir()] == ["years"]


def test_a_ranks_files_leave_those_of_others(tmp_path: Path) -> None:
    """Heartbeats, stacks and reports of hangs, the probe of a disk: each has its own name in its folder."""
    names = ("rank-1.json", "rank-00001.json.old", ".rank-00001.tmp", "notes.txt", ".speed-mine", ".report.tmp")
    for name in names:
        (tmp_path / name).write_text("years")
    write_heartbeat(tmp_path, Heartbeat(1, "n1", 2, 3, 4.0, 5, "step", 6.0, None, None))
    write_stacks(tmp_path, Spot(1, "n1", 5, "step", 1.0, "f (a.py:1)"))
    assert publish_report(tmp_path, 1, "ours") and not publish_report(tmp_path, 0, "a second one")
    write_speed(tmp_path, limit=1000)
    assert {path.name for path in tmp_path.iterdir()} == {*names, "rank-00001.json", "rank-00001.txt", "report.txt"}
    assert all((tmp_path / name).read_text() == "years" for name in names)


def test_the_mark_of_a_node_leaves_files_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    meeting = Meeting(World(0, 1, 0, 1), 20)
    assert shared_folder(tmp_path / "runs/new", meeting) == [True] and not list(tmp_path.iterdir())
    (tmp_path / ".doctor-mine").write_text("years")
    assert shared_folder(tmp_path, meeting) == [True]
    assert [path.name for path in tmp_path.iterdir()] == [".doctor-mine"]


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl"])
def test_a_run_folder_of_others_is_refused(tmp_path: Path, name: str) -> None:
    """A project's own config.yaml would be overwritten, the last line of its metrics cut off."""
    run = RunFolder(tmp_path)
    refuse_strangers(run)
    (tmp_path / name).write_text("theirs")
    with pytest.raises(UserError, match=f"holds {name} and no start of a run"):
        refuse_strangers(run)
    run.take_generation()
    refuse_strangers(run)
