"""The output folder of a write or an import: held while it is filled, finished with manifests and report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from conf.errors import UserError
from data_pipeline.corpus.inputs import Input
from data_pipeline.files import publish_json
from data_pipeline.manifest import REPORT, SPLITS, Manifest, write_manifest
from data_pipeline.shards.progress import Progress, claimed
from data_pipeline.tokenizer.tokenizer import Tokenizer


@contextmanager
def begun(out: Path, plan: dict[str, Any], splits: Sequence[str] = SPLITS) -> Iterator[Progress]:
    """The output folder, held, with what an earlier start of this plan finished; says so where that was all.

    Raises:
        UserError: the folder holds other work, or cannot be written.
    """
    try:
        with claimed(out):
            progress = Progress.open(out, plan, splits)
            if progress.done:
                print(f"{out}: already complete ({_totals(progress)})")
            yield progress
    except OSError as e:
        raise UserError(
            f"output={out}: {e.strerror or e}{f' ({e.filename})' if e.filename else ''}: finished shards are kept, "
            f"make room or mend it and run the same command again"
        ) from None


def listing(files: list[Input]) -> str:
    names = json.dumps([(f.name, f.size, f.mtime_ns) for f in files]).encode()
    return f"{len(files)} files, sha256 {hashlib.sha256(names).hexdigest()}"


def finish(source: str, tokenizer: Tokenizer, progress: Progress, body: dict[str, Any]) -> None:
    """The manifests and the report `body`, last: a source without a manifest is not a source."""
    body |= {split: {"documents": 0, "tokens": 0} for split in SPLITS}
    for split, found in progress.shards.items():
        folder = progress.folder / split
        shards = tuple(f.info for f in found)
        counts = {"documents": sum(s.documents for s in shards), "tokens": sum(s.tokens for s in shards)}
        if tokenizer.unk_id is not None:
            counts["unknown_characters"] = sum(f.unknown for f in found)
        body[folder.name] = counts
        if found:
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
    publish_json(progress.folder / REPORT, body)
    progress.done = True
    progress.save()
    print(f"{progress.folder}: {_totals(progress)}")


def dtype_of(tokenizer: Tokenizer) -> str:
    return "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"


def _totals(progress: Progress) -> str:
    parts = []
    for split, found in progress.shards.items():
        infos = [f.info for f in found]
        counts = sum(i.documents for i in infos), sum(i.tokens for i in infos)
        parts.append(
            f"{(progress.folder / split).name} {len(infos)} shards, {counts[0]:,} documents, {counts[1]:,} tokens"
        )
    return "; ".join(parts)
