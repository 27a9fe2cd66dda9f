"""The built-in corpus: the English prose in every Python installation.

The language reference in `pydoc_data` (one document a topic) and the docstrings of the standard library (one document
a module): about 2.2 MB in 700 documents. Sources are parsed, never imported: none of their code runs.
"""

from __future__ import annotations

import ast
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

TOPICS = "pydoc_data/topics.py"
SKIP = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def files() -> list[Path]:
    """The standard library's sources, sorted, without its tests and installed packages."""
    top = root()
    return sorted(p for p in top.rglob("*.py") if not SKIP & set(p.relative_to(top).parts))


def texts(path: Path) -> Iterator[tuple[str, str]]:
    """(name, prose) of each document in one source file.

    Raises:
        ValueError, SyntaxError: not a source this Python can parse.
    """
    name = path.relative_to(root()).as_posix()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a source's own invalid escapes are not news
        tree = ast.parse(path.read_bytes())
    if name == TOPICS:
        topics = next(n.value for n in tree.body if isinstance(n, ast.Assign))
        yield from ((f"topics/{topic}", text) for topic, text in ast.literal_eval(topics).items())
    else:
        yield name, "\n\n".join(_docstrings(tree))


def _docstrings(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        if text:
            yield text
    for part in ("body", "handlers", "orelse", "finalbody"):
        for child in getattr(node, part, ()):
            yield from _docstrings(child)
