"""The harness's own tasks with their data from files of this machine instead of Hugging Face's hub."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from conf.errors import UserError

SPLITS = ("train", "validation", "test")
FORMS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}  # of a split -> reader of datasets
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")


@contextmanager
def descriptions(local: dict[str, dict[str, Path]]) -> Iterator[str]:
    """A folder of the harness's own tasks that read these splits instead of the hub."""
    with TemporaryDirectory() as folder:
        for name, splits in local.items():
            body = {
                "include": str(_stock(name)),
                "task": name,
                "dataset_path": FORMS[next(iter(splits.values())).suffix],
                "dataset_name": None,
                "dataset_kwargs": {"data_files": {split: str(path) for split, path in splits.items()}},
                "training_split": "train" if "train" in splits else None,
                "validation_split": "validation" if "validation" in splits else None,
                "test_split": "test" if "test" in splits else None,
            }
            (Path(folder) / f"{name}.yaml").write_text(json.dumps(body), encoding="utf-8")  # JSON is YAML
        yield folder


def _stock(name: str) -> Path:
    """The harness's own description of a task."""
    import lm_eval.tasks

    paths = sorted(Path(lm_eval.tasks.__file__).parent.rglob("*.yaml"))
    line = f"task: {name}".encode()
    for path in sorted(paths, key=lambda path: path.stem != name):  # most are in a file of their name
        if line in path.read_bytes().splitlines():
            return path
    raise UserError(f"tasks=[{name}]: neither a task of conf/task/ nor of lm-evaluation-harness")


def splits_in(folder: Path) -> dict[str, Path]:
    """The splits of a task that lie in a folder.

    Raises:
        UserError: one split twice, or splits of two forms.
    """
    found = [path for split in SPLITS for suffix in FORMS if (path := folder / f"{split}{suffix}").is_file()]
    if len({path.stem for path in found}) < len(found) or len({FORMS[path.suffix] for path in found}) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError(f"task_data: {folder} holds {names}: give each split once, and all of them in one form")
    return {path.stem: path.resolve() for path in found}


@contextmanager
def offline() -> Iterator[None]:
    """Without questions to Hugging Face's hub; its libraries read this when they are imported, or later."""
    before = {name: os.environ.get(name) for name in OFFLINE}
    os.environ |= dict.fromkeys(OFFLINE, "1")
    try:
        yield
    finally:
        os.environ |= {name: value for name, value in before.items() if value is not None}
        for name in (name for name, value in before.items() if value is None):
            del os.environ[name]
