"""How far a write of shards has come, so that the same command goes on where a killed one stopped.

`progress.json` in the output folder: the plan (everything the bytes depend on) and each finished shard with the place
in the corpus where it ends. A shard that is not named there is written anew; nothing else is.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from conf.errors import UserError
from data_pipeline.files import publish_json, read_json
from data_pipeline.manifest import SPLITS, ShardInfo
from data_pipeline.shards.encode import Place

PROGRESS = "progress.json"


@dataclass(frozen=True)
class Finished:
    """A published shard, the place just behind its last document, and its count of unknown characters."""

    info: ShardInfo
    end: Place
    unknown: int


@dataclass
class Progress:
    folder: Path
    plan: dict[str, Any]
    shards: dict[str, list[Finished]]
    done: bool = False

    @classmethod
    def open(cls, folder: Path, plan: dict[str, Any], splits: Sequence[str] = SPLITS) -> Progress:
        """What is there, or a fresh start; what a killed write left half done is cleared away.

        A split's shards lie in the folder of that name in `folder`; an import's one split, ".", is `folder` itself.

        Raises:
            UserError: the folder holds other work, or a finished shard of it is gone.
        """
        if not (folder / PROGRESS).exists():
            for left in folder.glob(f".{PROGRESS}.*.tmp"):  # of a write that was killed as it began
                left.unlink()
            if any(folder.iterdir()):
                raise UserError(f"output={folder}: not empty, and not begun by this command: give a new folder")
            progress = cls(folder, plan, {split: [] for split in splits})
            progress.save()
            return progress
        cure = "delete the folder and write the shards anew"
        body = read_json(folder / PROGRESS, cure)
        try:
            shards = {
                split: [Finished(ShardInfo(**f["info"]), tuple(f["end"]), f["unknown"]) for f in found]
                for split, found in body["shards"].items()
            }
            begun, done = {**body["plan"]}, body["done"]
        except (KeyError, TypeError, AttributeError) as e:
            raise UserError(f"{folder / PROGRESS}: damaged ({e!r}): {cure}") from None
        if not any(shards.values()):  # begun, but nothing is lost by another plan
            begun, shards = plan, {split: [] for split in splits}
        for key in sorted(plan | begun):
            old, new = begun.get(key), plan.get(key)
            if old != new:
                raise UserError(
                    f"output={folder} was begun with {key}={old}, now {key}={new}: "
                    f"give another output=, or delete that folder"
                )
        if set(shards) != set(splits):
            raise UserError(f"{folder / PROGRESS}: damaged (shards of {', '.join(shards)}): {cure}")
        progress = cls(folder, plan, shards, done)
        progress._check()
        return progress

    def end(self, split: str) -> Place:
        return self.shards[split][-1].end if self.shards[split] else (0, 0)

    def add(self, split: str, finished: Finished) -> None:
        self.shards[split].append(finished)
        self.save()

    def save(self) -> None:
        publish_json(
            self.folder / PROGRESS,
            {
                "plan": self.plan,
                "done": self.done,
                "shards": {split: [asdict(f) for f in found] for split, found in self.shards.items()},
            },
        )

    def _check(self) -> None:
        for split, found in self.shards.items():
            for shard in found:
                path = self.folder / split / shard.info.name
                if not path.is_file() or path.stat().st_size != shard.info.bytes:
                    raise UserError(
                        f"{path}: finished before, now gone or changed: delete {self.folder} and write anew"
                    )
        for left in [*self.folder.glob(".*.tmp"), *self.folder.glob("*/.*.tmp")]:
            left.unlink()


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Make the folder and hold it: two writes into one output would spoil each other."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output={folder}: no folder, but a file is there: give another output=")
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(
            f"output={folder}: another write is at work there: wait for it, or give another output="
        ) from None
    finally:
        os.close(handle)
