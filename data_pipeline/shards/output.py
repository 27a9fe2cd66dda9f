"""The output folder of a write, an import or a recipe: held by one command, and continued where a killed one stopped.

`progress.json` in the folder of shards: the plan (everything the bytes depend on) and each finished shard with the
position in the corpus where it ends. A shard that is not listed there is written again, and no other one.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from conf.errors import UserError, of_nature
from data_pipeline.corpus.inputs import Input
from data_pipeline.files import from_json, publish_json, read_json, remove_unfinished
from data_pipeline.manifest import MANIFEST, REPORT, SPLITS, TOKENIZER, Manifest, ShardInfo, write_manifest
from data_pipeline.tokenizer.tokenizer import Tokenizer

PROGRESS = "progress.json"
FILES = rf"\d{{5,}}\.(?:tar|idx\.json)|{PROGRESS}|{REPORT}|{MANIFEST}|{TOKENIZER}"  # a regular expression
Position = tuple[int, int]
"""(task, item of that task) of a document in the corpus."""


@dataclass(frozen=True)
class Finished:
    """The restart marker of a published shard: its end, behind its last document, and its unknown characters."""

    info: ShardInfo
    end: Position
    unknown: int


@dataclass
class Progress:
    """The plan and the finished shards of each split, as progress.json has them."""

    folder: Path
    plan: dict[str, Any]
    shards: dict[str, list[Finished]]
    done: bool = False

    @classmethod
    def open(cls, folder: Path, plan: dict[str, Any], splits: Sequence[str]) -> Progress:
        """The progress of an earlier start, or a new one; half-written files of a killed write are removed.

        A split's shards are in the folder of that name in `folder`; an import's one split, ".", is `folder` itself.

        Raises:
            UserError: the folder holds other work, or one of its finished shards is missing.
        """
        path = folder / PROGRESS
        if not path.exists():
            remove_unfinished(folder, PROGRESS)  # of a write that was killed at its start
            refuse_other_files(folder, any(folder.iterdir()))
            progress = cls(folder, plan, {split: [] for split in splits})
            progress.save()
            return progress
        cure = "delete the folder and write the shards again"
        progress = from_json(cls, read_json(path, cure), path, cure, folder=folder)
        if not any(progress.shards.values()):  # nothing is lost by another plan
            progress = cls(folder, plan, {split: [] for split in splits}, progress.done)
        refuse_other_plan(folder, progress.plan, plan)
        if set(progress.shards) != set(splits):
            raise UserError(f"{path}: damaged (shards of {', '.join(progress.shards)}): {cure}")
        progress._check_shards()
        return progress

    def end(self, split: str) -> Position:
        return self.shards[split][-1].end if self.shards[split] else (0, 0)

    def add(self, split: str, finished: Finished) -> None:
        self.shards[split].append(finished)
        self.save()

    def save(self) -> None:
        shards = {split: [asdict(f) for f in finished] for split, finished in self.shards.items()}
        publish_json(self.folder / PROGRESS, {"plan": self.plan, "done": self.done, "shards": shards})

    def totals(self) -> str:
        """One line for the user: "train 2 shards, 12 documents, 345 tokens; val 1 shards, ..."."""
        parts = []
        for split, finished in self.shards.items():
            documents, tokens = sum(f.info.documents for f in finished), sum(f.info.tokens for f in finished)
            name = (self.folder / split).name
            parts.append(f"{name} {len(finished)} shards, {documents:,} documents, {tokens:,} tokens")
        return "; ".join(parts)

    def _check_shards(self) -> None:
        for split, finished in self.shards.items():
            for shard in finished:
                path = self.folder / split / shard.info.name
                if not path.is_file() or path.stat().st_size != shard.info.bytes:
                    raise UserError(
                        f"{path}: finished before, now gone or changed: delete {self.folder} and write again"
                    )
        for folder in {self.folder, *(self.folder / split for split in self.shards)}:
            remove_unfinished(folder, FILES)


@contextmanager
def open_output(out: Path, plan: dict[str, Any], splits: Sequence[str] = SPLITS) -> Iterator[Progress]:
    """The output folder, held, with the finished shards of this plan; prints a line if all are.

    Raises:
        UserError: the folder holds other work, or cannot be written.
    """
    try:
        with claimed(out):
            progress = Progress.open(out, plan, splits)
            if progress.done:
                print(f"{out}: already complete ({progress.totals()})")
            yield progress
    except OSError as e:
        raise of_nature(
            e,
            f"output={out}: {e.strerror or e}{f' ({e.filename})' if e.filename else ''}: finished shards are kept, "
            f"make room or fix it and run the same command again",
        ) from None


def finish(source: str, tokenizer: Tokenizer, progress: Progress, report: dict[str, Any]) -> None:
    """Write the manifests and the report at the end: a source without a manifest is not a source."""
    report |= {split: {"documents": 0, "tokens": 0} for split in SPLITS}
    for split, finished in progress.shards.items():
        folder = progress.folder / split
        shards = tuple(f.info for f in finished)
        counts = {"documents": sum(s.documents for s in shards), "tokens": sum(s.tokens for s in shards)}
        if tokenizer.unk_id is not None:
            counts["unknown_characters"] = sum(f.unknown for f in finished)
        report[folder.name] = counts
        if shards:
            tokenizer.save(folder)
            manifest = Manifest(
                root=folder,
                source=source,
                split=folder.name,
                dtype=dtype_of(tokenizer),
                vocab_size=tokenizer.vocab_size,
                eot_id=tokenizer.eot_id,
                tokenizer_sha256=tokenizer.sha256,
                shards=shards,
            )
            write_manifest(manifest)
    publish_json(progress.folder / REPORT, report)
    progress.done = True
    progress.save()
    print(f"{progress.folder}: {progress.totals()}")


def dtype_of(tokenizer: Tokenizer) -> str:
    return "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"


def listing(files: list[Input]) -> str:
    """The number of files, and a hash of their names, sizes and times: equal if none of them changed."""
    names = json.dumps([(f.name, f.size, f.mtime_ns) for f in files]).encode()
    return f"{len(files)} files, sha256 {hashlib.sha256(names).hexdigest()}"


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Create the folder and hold it: two commands that write into one output would damage each other's work."""
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


def refuse_other_files(folder: Path, has_files: bool) -> None:
    if has_files:
        raise UserError(f"output={folder}: not empty, and not begun by this command: give a new folder")


def refuse_other_plan(folder: Path, begun: dict[str, Any], plan: dict[str, Any]) -> None:
    """Raises UserError if the output was begun by another plan; names the first value that differs."""
    for key in sorted(plan | begun):
        old, new = begun.get(key), plan.get(key)
        if old != new:
            raise UserError(
                f"output={folder} was begun with {key}={old}, now {key}={new}: "
                f"give another output=, or delete that folder"
            )
