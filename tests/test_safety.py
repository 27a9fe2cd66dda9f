"""docs/safety.md: every place that removes or overwrites, each with its proof, and strangers' files in its way."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from conf.errors import UserError
from data_pipeline.files import own_folder, publish, remove_unfinished
from trainer.checkpoint.claim import refuse_strangers
from trainer.run.folder import RunFolder

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/safety.md").read_text(encoding="utf-8")
ROWS = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.splitlines() if line.startswith("| `")]


def removals(source: str) -> Iterator[list[str]]:
    """The names of the functions and classes around each call that removes, renames over or cuts a file."""

    def visit(node: ast.AST, around: list[str]) -> Iterator[list[str]]:
        for child in ast.iter_child_nodes(node):
            named = isinstance(child, ast.FunctionDef | ast.ClassDef)
            if isinstance(child, ast.Call) and isinstance(child.func, ast.Attribute):
                name, path_like = child.func.attr, len(child.args) == 1 and not child.keywords
                always = name in ("rmtree", "unlink", "rmdir", "truncate", "ftruncate")
                if always or (name in ("replace", "rename") and path_like):
                    yield around
            yield from visit(child, [*around, child.name] if named else around)  # type: ignore[attr-defined]

    yield from visit(ast.parse(source), [])


def test_every_removal_in_the_code_has_its_proof() -> None:
    assert list(removals("def f():\n p.unlink()\n 'a'.replace('b', 'c')")) == [["f"]]
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
    assert not name or f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), row[3]
    assert (ROOT / path).is_file(), row[3]


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
