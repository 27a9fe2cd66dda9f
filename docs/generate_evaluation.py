"""`make docs` writes the tasks in docs/evaluation.md from conf/task/; tests/test_docs.py fails if they are stale."""

from __future__ import annotations

import re
from pathlib import Path

from conf.schema import opening_comment
from trainer.evaluation.tasks.description import KINDS
from trainer.evaluation.tasks.find import FOLDER, known_tasks, load_tasks

TARGET = Path(__file__).with_name("evaluation.md")
PLACE = re.compile(r"<!-- tasks -->.*?(?=\n## )", re.DOTALL)


def page() -> str:
    """docs/evaluation.md with the table as conf/task/ is now."""
    rows = ["<!-- tasks -->", "", "| task | | kind | files |", "|---|---|---|---|"]
    for name in known_tasks():
        tasks = load_tasks([name])
        kinds = {kind for task in tasks.values() for kind in KINDS if getattr(task, kind) is not None}
        files = {file: sha for task in tasks.values() for file, sha in task.data.files.items()}
        kind = ", ".join(sorted(kinds)) if len(tasks) == 1 else f"{len(tasks)} tasks: {', '.join(sorted(kinds))}"
        shown = f"`{next(iter(files))}`" + (f" and {len(files) - 1} more" if len(files) > 1 else "")
        known = "" if None not in files.values() else ", sha256 not known"
        comment = opening_comment(FOLDER / f"{name}.yaml").replace("|", r"\|")
        rows.append(f"| `{name}` | {comment} | {kind} | {shown}{known} |")
    table = "\n".join(rows) + "\n"
    return PLACE.sub(lambda _: table, TARGET.read_text(encoding="utf-8"))


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
    print(f"wrote {TARGET}")
