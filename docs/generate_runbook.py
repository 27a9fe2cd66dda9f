"""`make docs` writes the table of errors of docs/runbook.md from conf/errors.py; tests/test_docs.py finds it stale."""

from __future__ import annotations

import errno

from conf.errors import PERMANENT, TRANSIENT
from docs.generate_architecture import PART, ROOT

TARGET = ROOT / "docs/runbook.md"


def page() -> str:
    """The page as it should be: the marked part generated, the rest unchanged."""
    return PART.sub(lambda match: f"{match[1]}{errors()}{match[3]}", TARGET.read_text(encoding="utf-8"))


def errors() -> str:
    rows = [
        *(f"| {errno.errorcode[number]} | {words} | 1 |" for number, words in TRANSIENT.items()),
        *(f"| {errno.errorcode[number]} | {words} | 2 |" for number, words in PERMANENT.items()),
        "| any other | | 1 |",
    ]
    return "\n".join(["| error | meaning | exit code |", "|---|---|---|", *rows])


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
    print(f"wrote {TARGET}")
