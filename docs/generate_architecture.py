"""`make docs` fills docs/architecture.md: packages from their first paragraphs, import rules from docs/imports.toml."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs/architecture.md"
RULES = tomllib.loads((ROOT / "docs/imports.toml").read_text(encoding="utf-8"))
PART = re.compile(r"(<!-- (\w+): made by `make docs` -->\n).*?(\n<!-- end -->)", re.DOTALL)


def page() -> str:
    """The page as it should be: the text that stands there, with its three made parts made anew."""
    parts = {"packages": packages, "layers": layers, "libraries": libraries}
    return PART.sub(lambda m: f"{m[1]}{parts[m[2]]()}{m[3]}", TARGET.read_text(encoding="utf-8"))


def packages() -> str:
    """One list entry for each package, from top to bottom of the tree: its path and its docstring."""
    lines = []
    for top in ("conf", "data_pipeline", "trainer", "launch"):
        for path in sorted((ROOT / top).rglob("__init__.py")):
            text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            folder = path.parent.relative_to(ROOT)
            lines.append(f"{'  ' * (len(folder.parts) - 1)}- `{folder.as_posix()}/` {' '.join(text.split())}")
    return "\n".join(lines)


def layers() -> str:
    """The layers from the bottom up, then the exceptions, one a line."""
    lines = [" < ".join(f"`{name}`" for name in RULES["layers"]), ""]
    for rule in RULES["never"]:
        who, what = (", ".join(f"`{name}`" for name in rule[key]) for key in ("modules", "imports"))
        lines.append(f"- {who} may not import {what}: {rule['reason']}.")
    plain = ", ".join(f"`{name}`" for rule in RULES["plain"] for name in rule["modules"])
    return "\n".join([*lines, f"- Standard library only: {plain}."])


def libraries() -> str:
    rows = [
        f"| {name} | {', '.join(f'`{file}`' for file in files) or 'nobody'} |"
        for name, files in RULES["libraries"].items()
    ]
    return "\n".join(["| library | files that may import it |", "|---|---|", *rows])


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
    print(f"wrote {TARGET}")
