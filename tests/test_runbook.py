"""docs/runbook.md quotes what the program prints: each quoted line is still in the source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer.run import exit_codes

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/runbook.md").read_text(encoding="utf-8")
HOLE = "\0"
TABLES = [
    [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    for line in PAGE.splitlines()
    if line.startswith("|") and not line.startswith("|---")
]
QUOTES = [quote for row in TABLES for quote in re.findall(r"`([^`]+)`", row[0])]


def templates() -> Iterator[str]:
    """Every text in the source, with HOLE where something is filled in."""
    for package in ("conf", "data_pipeline", "launch", "trainer"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    yield "".join(str(v.value) if isinstance(v, ast.Constant) else HOLE for v in node.values)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value
    for path in sorted(ROOT.glob("launch/**/*.jinja")):
        yield from re.sub(r"\{\{.*?\}\}|\$\{.*?\}|\$\w+", HOLE, path.read_text(encoding="utf-8")).splitlines()


def says(template: str, quote: str) -> bool:
    """Whether a text of the program, its holes filled in, may hold the quoted line; … stands for what fills holes."""
    parts = [part.strip() for part in quote.split("…") if part.strip(" :,")]
    return re.search(".*".join(map(re.escape, parts)), template, re.DOTALL) is not None


TEMPLATES = sorted(set(templates()))


@pytest.mark.parametrize("quote", QUOTES)
def test_what_the_runbook_quotes_is_what_the_program_says(quote: str) -> None:
    assert len(re.sub(r"[^a-z]", "", quote)) > 10, "too short to be told from others"
    assert any(says(template, quote) for template in TEMPLATES)


def test_a_quote_that_the_program_does_not_say_is_found() -> None:
    assert says(f"step {HOLE} is lost: {HOLE} of them", "step … is lost: … of them")
    assert not says(f"step {HOLE} is lost: {HOLE} of them", "step … was lost: … of them")
    assert len(QUOTES) > 40


def test_every_command_in_the_runbook_is_there() -> None:
    for module in re.findall(r"python -m ([\w.]+)", PAGE):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


def test_every_exit_code_has_its_row() -> None:
    told = [row[0] for row in TABLES]
    for name, code in vars(exit_codes).items():
        if name.isupper():
            assert str(code) in told, name
