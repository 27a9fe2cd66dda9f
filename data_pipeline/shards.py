"""Entry: documents -> tar shards with manifests (write), and the proof that they are whole (verify).

    python -m data_pipeline.shards write corpus=text corpus.path=FOLDER tokenizer=gpt2 output=DIR
    python -m data_pipeline.shards verify path=DIR

DIR/train and DIR/val are sources (data_pipeline/manifest.py says what is in one); DIR/report.json counts what was kept
and dropped. The same input gives the same bytes, on any number of workers, after any number of kills.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.bpe import EOT, Tokenizer
from data_pipeline.config import ShardsConfig, UserError, VerifyConfig
from data_pipeline.manifest import (
    FORMAT,
    REPORT,
    SPLITS,
    Block,
    Manifest,
    ShardIndex,
    ShardInfo,
    encode_block,
    index_name,
    publish_json,
    rename,
    write_index,
    write_manifest,
)
from data_pipeline.prepare import encode, read
from data_pipeline.prepare.encode import Encoded, Job, encode_all, tasks
from data_pipeline.prepare.progress import Finished, Progress, claimed
from data_pipeline.prepare.read import Input, empty, inputs, records
from data_pipeline.prepare.report import Dropped, Report

WORTH_A_WORKER = 16 << 20  # bytes of input; below it, starting a process costs more than it saves


class ShardWriter:
    """One shard: written aside as documents come, then published whole with its index."""

    def __init__(self, folder: Path, number: int, cfg: ShardsConfig) -> None:
        import webdataset as wds  # brings torch

        folder.mkdir(exist_ok=True)
        self.path = folder / f"{number:05d}.tar"
        self.block_tokens = cfg.block_tokens
        self.aside = self.path.with_name(f".{self.path.name}.tmp")
        self.file = self.aside.open("wb")
        self.tar = wds.TarWriter(self.file, encoder=False, mtime=0)
        self.blocks: list[Block] = []
        self.documents: list[tuple[str, int]] = []
        self.held: list[tuple[dict[str, str], np.ndarray]] = []
        self.held_tokens = self.tokens = self.unknown = 0

    def add(self, doc: Encoded, ids: np.ndarray) -> None:
        """A block holds whole documents, up to `block_tokens`; a longer document is a block on its own."""
        if self.held and self.held_tokens + len(ids) > self.block_tokens:
            self._write_block()
        self.held.append((doc.origin, ids))
        self.held_tokens += len(ids)
        self.tokens += len(ids)
        self.unknown += doc.unknown
        self.documents.append((doc.origin["id"], len(ids)))

    def publish(self) -> ShardInfo:
        self._write_block()
        self.tar.close()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        with self.aside.open("rb") as f:
            sha256 = hashlib.file_digest(f, "sha256").hexdigest()
        info = ShardInfo(self.path.name, self.aside.stat().st_size, sha256, len(self.documents), self.tokens)
        ids, counts = zip(*self.documents, strict=True)
        write_index(self.path.with_name(index_name(self.path.name)), ShardIndex(tuple(self.blocks), ids, counts))
        rename(self.aside, self.path)
        return info

    def _write_block(self) -> None:
        key = f"{len(self.blocks):06d}"
        ids = np.concatenate([ids for _, ids in self.held])
        origins = [{**origin, "tokens": len(ids)} for origin, ids in self.held]
        provenance = json.dumps({"documents": origins}, ensure_ascii=False).encode()
        self.tar.write({"__key__": key, "npy": encode_block(ids), "json": provenance})
        self.blocks.append(Block(f"{key}.npy", len(ids), zlib.crc32(ids.tobytes())))
        self.held, self.held_tokens = [], 0


def write(cfg: ShardsConfig) -> None:
    """Write, or go on writing, or find that all is written.

    Raises:
        UserError: nothing to write, nowhere to write it, or the output holds other work.
    """
    tokenizer = Tokenizer.load(cfg.tokenizer)
    files = inputs(cfg.corpus)
    out = Path(cfg.output)
    try:
        with claimed(out):
            progress = Progress.open(out, _plan(cfg, tokenizer, files))
            if progress.done:
                print(f"{out}: already complete ({_totals(progress)})")
                return
            if tokenizer.engine == "tokenizers" and tokenizer.byte_level:
                print(
                    "fastokens is not installed: the same ids, 30 times slower (pip install fastokens)", file=sys.stderr
                )
            if tokenizer.eot_id is None:
                print(
                    f"tokenizer={cfg.tokenizer} has no {EOT}: documents are packed without a separator", file=sys.stderr
                )
            report = _write_shards(cfg, tokenizer, files, progress)
            _finish(cfg, tokenizer, progress, report)
    except OSError as e:
        raise UserError(
            f"output={out}: {e.strerror or e}{f' ({e.filename})' if e.filename else ''}: finished shards are kept, "
            f"make room or mend it and run the same command again"
        ) from None


def _plan(cfg: ShardsConfig, tokenizer: Tokenizer, files: list[Input]) -> dict[str, Any]:
    """All that the bytes of the output depend on."""
    listing = json.dumps([(f.name, f.size, f.mtime_ns) for f in files]).encode()
    return {
        "format": FORMAT,
        "corpus": cfg.corpus.name,
        "corpus.format": cfg.corpus.format.value,
        "corpus.path": cfg.corpus.path and str(Path(cfg.corpus.path).resolve()),
        "corpus.text_key": cfg.corpus.text_key,
        "corpus.id_key": cfg.corpus.id_key,
        "corpus files (names, sizes, times)": f"{len(files)} files, sha256 {hashlib.sha256(listing).hexdigest()}",
        "tokenizer": f"sha256 {tokenizer.sha256}",
        "val_fraction": cfg.val_fraction,
        "shard_tokens": cfg.shard_tokens,
        "block_tokens": cfg.block_tokens,
        "task, block, line, file bytes of this version": [encode.TASK, read.BLOCK, read.MAX_LINE, read.MAX_FILE],
    }


def _write_shards(cfg: ShardsConfig, tokenizer: Tokenizer, files: list[Input], progress: Progress) -> Report:
    from tqdm import tqdm

    total = sum(f.size for f in files)
    cores = len(os.sched_getaffinity(0))
    workers = cfg.workers or min(cores, 1 + total // WORTH_A_WORKER)
    finished = {split: progress.end(split) for split in SPLITS}
    job = Job(cfg.corpus, tokenizer.raw, _dtype(tokenizer), cfg.val_fraction, finished)
    report = Report()
    shards: dict[str, ShardWriter] = {}
    documents = tokens = last = 0
    every = 0.5 if sys.stderr.isatty() else 30.0
    with tqdm(total=total, unit="B", unit_scale=True, desc=cfg.corpus.name, mininterval=every) as bar:
        for task, items in encode_all(job, tasks(records(cfg.corpus, files)), workers):
            for item in items:
                if isinstance(item, Dropped):
                    report.drop(item)
                    continue
                report.kept += 1
                if item.ids is None:
                    continue
                split = item.split
                if split not in shards:
                    shards[split] = ShardWriter(progress.folder / split, len(progress.shards[split]), cfg)
                shards[split].add(item, item.ids)
                documents, tokens = documents + 1, tokens + len(item.ids)
                if shards[split].tokens >= cfg.shard_tokens:
                    _publish(shards.pop(split), split, (item.place[0], item.place[1] + 1), progress)
            seconds = max(bar.format_dict["elapsed"], 1e-9)
            bar.set_postfix_str(
                f"{documents / seconds:,.0f} documents/s, {tokens / seconds:,.0f} tokens/s", refresh=False
            )
            bar.update(task.size)
            last = task.number
    for split, shard in shards.items():
        _publish(shard, split, (last + 1, 0), progress)
    return report


def _publish(shard: ShardWriter, split: str, end: tuple[int, int], progress: Progress) -> None:
    progress.add(split, Finished(shard.publish(), end, shard.unknown))


def _finish(cfg: ShardsConfig, tokenizer: Tokenizer, progress: Progress, report: Report) -> None:
    """The manifests, last: a source without one is not a source."""
    report.print()
    if not report.kept:
        raise empty(cfg.corpus, report)
    if not progress.shards["train"]:
        raise UserError(
            f"val_fraction={cfg.val_fraction}: all {report.kept} documents fell into validation, none is left to train "
            f"on: give a smaller val_fraction, or a corpus of more documents"
        )
    body = report.to_json()
    for split, found in progress.shards.items():
        folder = progress.folder / split
        shards = tuple(f.info for f in found)
        body[split] = {"documents": sum(s.documents for s in shards), "tokens": sum(s.tokens for s in shards)}
        if tokenizer.unk_id is not None:
            body[split]["unknown_characters"] = sum(f.unknown for f in found)
        if found:
            tokenizer.save(folder)
            manifest = Manifest(
                root=folder,
                source=cfg.corpus.name,
                split=split,
                dtype=_dtype(tokenizer),
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
    if not progress.shards["val"]:
        print(
            f"val_fraction={cfg.val_fraction}: none of the {report.kept} documents fell into validation, there is no "
            f"{progress.folder / 'val'}, which trainer.pretrain needs: give a larger val_fraction and another output=",
            file=sys.stderr,
        )


def _dtype(tokenizer: Tokenizer) -> str:
    return "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"


def _totals(progress: Progress) -> str:
    parts = []
    for split, found in progress.shards.items():
        infos = [f.info for f in found]
        counts = sum(i.documents for i in infos), sum(i.tokens for i in infos)
        parts.append(f"{split} {len(infos)} shards, {counts[0]:,} documents, {counts[1]:,} tokens")
    return "; ".join(parts)


def verify(cfg: VerifyConfig) -> None:
    from data_pipeline.verify import verify as check

    check(Path(cfg.path))


if __name__ == "__main__":
    from conf.schema import run

    run({"write": ("shards", write), "verify": ("verify", verify)})
