"""One-line mutants of trainer/ and launch/, each run against the tests of its package: `python -m tests.mutants`.

    count=40                     so many, drawn with seed=20261130, as many of each operator
    only=3,17                    these alone, once more
    journal=build/mutants.jsonl  what is done; the same command goes on from there after an interruption

The tests run in a copy of the tree; the checkout is never changed. A mutant is killed if a test fails, or takes far
longer than without it. One that survives is equal in effect, or a test is missing. It takes hours, and is no part of
`make test`.
"""

from __future__ import annotations

import ast
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("trainer", "launch")
NO_TESTS = 5  # pytest's exit code where it collects none
TURNED: dict[type[ast.cmpop], tuple[str, str]] = {
    ast.Lt: ("<", ">="),
    ast.GtE: (">=", "<"),
    ast.Gt: (">", "<="),
    ast.LtE: ("<=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
}


@dataclass(frozen=True)
class Mutant:
    """One line of a file, as it is and as it becomes."""

    path: str
    line: int  # from 1
    operator: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line} {self.operator}: `{self.before.strip()}` -> `{self.after.strip()}`"

    def applied(self, source: str) -> str:
        lines = source.splitlines(keepends=True)
        ending = lines[self.line - 1][len(self.before) :]
        lines[self.line - 1] = self.after + ending
        return "".join(lines)


Edit = tuple[int, int, str]  # first and last byte in the line of a node, and the new text


def comparison(node: ast.AST, text: Callable[[ast.AST], str]) -> Iterator[Edit]:
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        old, new = TURNED[type(node.ops[0])]
        yield from between(node.left, node.comparators[0], text(node), node.col_offset, old, new)


def constant(node: ast.AST, text: Callable[[ast.AST], str]) -> Iterator[Edit]:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        new = node.value + 1 if isinstance(node.value, int) else (node.value * 1.1 or 0.1)
        yield node.col_offset, node.end_col_offset or 0, repr(new)


def statement(node: ast.AST, text: Callable[[ast.AST], str]) -> Iterator[Edit]:
    called = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    if called or isinstance(node, ast.AugAssign | ast.Raise | ast.Continue | ast.Break):
        yield node.col_offset, node.end_col_offset or 0, "pass"  # type: ignore[attr-defined]


def and_or(node: ast.AST, text: Callable[[ast.AST], str]) -> Iterator[Edit]:
    if isinstance(node, ast.BoolOp):
        old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        yield from between(node.values[0], node.values[1], text(node), node.col_offset, old, new)


def argument_order(node: ast.AST, text: Callable[[ast.AST], str]) -> Iterator[Edit]:
    if isinstance(node, ast.Call) and len(node.args) > 1 and not any(isinstance(a, ast.Starred) for a in node.args[:2]):
        first, second = node.args[:2]
        if (a := text(first)) != (b := text(second)):
            whole, start = text(node).encode(), node.col_offset
            middle = whole[(first.end_col_offset or 0) - start : second.col_offset - start].decode()
            yield first.col_offset, second.end_col_offset or 0, b + middle + a


def between(left: ast.expr, right: ast.expr, whole: str, start: int, old: str, new: str) -> Iterator[Edit]:
    """An operator that stands between two operands, maybe beside brackets."""
    first, last = left.end_col_offset or 0, right.col_offset
    middle = whole.encode()[first - start : last - start].decode()
    if middle.count(old) == 1:
        yield first, last, middle.replace(old, new)


OPERATORS = {
    "comparison": comparison,
    "constant": constant,
    "statement": statement,
    "and/or": and_or,
    "arguments": argument_order,
}


def mutants_of(path: str, source: str) -> Iterator[Mutant]:
    """The mutants of a file: of what stands on one line, and in no type and no text."""
    tree, lines = ast.parse(source), source.splitlines()
    left_out = {
        id(part)
        for node in ast.walk(tree)
        for outer in (getattr(node, "annotation", None), getattr(node, "returns", None), node)
        if outer is not None and (outer is not node or isinstance(node, ast.JoinedStr))
        for part in ast.walk(outer)
    }
    for node in ast.walk(tree):
        at = getattr(node, "lineno", None)
        if at is None or at != getattr(node, "end_lineno", None) or id(node) in left_out:
            continue
        line = lines[at - 1].encode()

        def text(part: ast.AST, line: bytes = line) -> str:
            return line[part.col_offset : part.end_col_offset].decode()  # type: ignore[attr-defined]

        for name, operator in OPERATORS.items():
            for first, last, new in operator(node, text):
                yield Mutant(path, at, name, line.decode(), (line[:first] + new.encode() + line[last:]).decode())


def compiles(source: str) -> bool:
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True


def draw(count: int, seed: int, packages: Sequence[str] = PACKAGES) -> list[Mutant]:
    """`count` mutants, the operators in turn. The same of the same source and seed."""
    paths = sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))
    every: dict[str, list[Mutant]] = {name: [] for name in OPERATORS}
    for path in paths:
        for mutant in mutants_of(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")):
            every[mutant.operator].append(mutant)
    rng, names = random.Random(seed), list(OPERATORS)
    drawn: list[Mutant] = []
    while len(drawn) < count:
        mutant = rng.choice(every[names[len(drawn) % len(names)]])
        source = (ROOT / mutant.path).read_text(encoding="utf-8")
        drawn += [mutant] if mutant not in drawn and compiles(mutant.applied(source)) else []
    return drawn


def files_for(path: str, root: Path = ROOT) -> list[str]:
    """The test files that import a module, then the others of its package; without any, importers of the package."""
    module, package = path.removesuffix(".py").removesuffix("/__init__").replace("/", "."), Path(path).parent
    kinds = [root / "tests" / kind for kind in ("unit", "distributed", "system", "")]
    files = dict.fromkeys(file for kind in kinds for file in sorted(kind.rglob("test_*.py")))
    texts = {file: file.read_text(encoding="utf-8") for file in files}
    near = [file for file in files if kinds[0] in file.parents or kinds[1] in file.parents]
    found = [file for file in near if imports(texts[file], module)]
    found += [file for file in near if file.parent.relative_to(root / "tests").parts[1:] == package.parts]
    found = found or [file for file in files if f"from {module.rpartition('.')[0]}" in texts[file]]
    return [file.relative_to(root).as_posix() for file in dict.fromkeys(found)]


def imports(text: str, module: str) -> bool:
    package, _, name = module.rpartition(".")
    of_package = re.search(rf"^from {package} import .*\b{name}\b", text, re.MULTILINE)
    return of_package is not None or f"from {module} import " in text or f"import {module}\n" in text


def tried(scratch: Path, tests: Sequence[str], limit_s: float) -> tuple[str, float]:
    """("killed by …" or "survived", seconds) of the tests in the copied tree."""
    started = time.monotonic()
    if not tests:
        return "survived: no test", 0.0
    argv = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    env = {
        **os.environ,
        "PYTHONPATH": str(scratch),
        "PYTHONDONTWRITEBYTECODE": "1",
    }  # a cache may be of another line
    with subprocess.Popen(
        argv, cwd=scratch, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            out, _ = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            out = f"FAILED to end in {limit_s:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    seconds = time.monotonic() - started
    if process.returncode in (0, NO_TESTS):
        return "survived", seconds
    said = [line for line in out.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return f"killed by {said[0].split(' - ')[0] if said else f'exit code {process.returncode}'}", seconds


def copy_tree(scratch: Path) -> None:
    """Copy the files that git knows or does not ignore, into a repository of their own: some tests ask for a commit."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, scratch / name)
    author = ("-c", "user.name=mutants", "-c", "user.email=mutants@localhost")
    for words in (("init", "-q"), ("add", "-A"), (*author, "commit", "-q", "-m", "A copy")):
        subprocess.run(["git", "-C", str(scratch), *words], check=True)


class Journal:
    """What is done, a line of JSON each; lines of another source or of a kill are passed over."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done: list[dict[str, Any]] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    self.done.append(json.loads(line))
                except ValueError:
                    continue

    def find(self, key: dict[str, Any]) -> dict[str, Any] | None:
        return next((row for row in reversed(self.done) if row["key"] == key), None)

    def add(self, key: dict[str, Any], end: str, seconds: float) -> dict[str, Any]:
        row = {"key": key, "end": end, "seconds": round(seconds, 1)}
        self.done.append(row)
        with self.path.open("a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")
        return row


def run(mutants: Sequence[Mutant], only: Sequence[int], journal: Journal) -> list[str]:
    """Try the mutants of these numbers; a line for each as it is done, returned too."""
    lines, spent = [], list[float]()
    with tempfile.TemporaryDirectory(prefix="mutants-") as made:
        scratch = Path(made)
        copy_tree(scratch)
        for position, number in enumerate(only):
            mutant = mutants[number - 1]
            row = journal.find(asdict(mutant)) if len(only) == len(mutants) else None
            if row is None:
                started = time.monotonic()
                row = journal.add(asdict(mutant), *one(mutant, scratch, journal))
                spent.append(time.monotonic() - started)
            left_s = sum(spent) / len(spent) * (len(only) - position - 1) if spent else 0.0
            lines.append(f"{number}/{len(mutants)} {row['end']}: {mutant}")
            print(f"{lines[-1]} ({row['seconds']:.0f} s; {left_s / 60:.0f} minutes left)", flush=True)
    return lines


def one(mutant: Mutant, scratch: Path, journal: Journal) -> tuple[str, float]:
    """The end of a mutant; its tests first pass without it, once for all mutants that share them."""
    tests, file = files_for(mutant.path), scratch / mutant.path
    whole = {"tests": tests}
    before = journal.find(whole) or journal.add(whole, *tried(scratch, tests, 3600))
    if not before["end"].startswith("survived"):
        return f"not tried, for without it: {before['end']}", 0.0
    source = file.read_text(encoding="utf-8")
    file.write_text(mutant.applied(source), encoding="utf-8")
    try:
        return tried(scratch, tests, 60 + 3 * before["seconds"])
    finally:
        file.write_text(source, encoding="utf-8")


def main(words: Sequence[str]) -> None:
    given = {"count": "40", "seed": "20261130", "only": "", "journal": "build/mutants.jsonl"}
    for word in words:
        key, mark, value = word.partition("=")
        if not mark or key not in given:
            sys.exit(f"error: {word}: give {', '.join(f'{name}=' for name in given)}\n\n{__doc__}")
        given[key] = value
    mutants = draw(int(given["count"]), int(given["seed"]))
    only = [int(number) for number in given["only"].split(",") if number] or range(1, len(mutants) + 1)
    lines = run(mutants, only, Journal(Path(given["journal"])))
    alive = [line for line in lines if line.split()[1] != "killed"]  # it survived, or was not tried
    print(f"{len(lines)} mutants, {len(lines) - len(alive)} killed", *alive, sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
