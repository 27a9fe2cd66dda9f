"""Documents -> tar shards with manifests: `python -m data_pipeline.shards write`, and the last stage of a recipe.

    python -m data_pipeline.shards write corpus=text corpus.path=FOLDER tokenizer=gpt2 output=DIR
    python -m data_pipeline.shards verify path=DIR
    python -m data_pipeline.shards import format=nanogpt input=train.bin tokenizer=gpt2 output=DIR
    python -m data_pipeline.shards export path=DIR/train output=FILE.bin

DIR/train and DIR/val are sources (data_pipeline/manifest.py describes their files); DIR/report.json counts the kept and
the dropped documents. The same input gives the same bytes, on any number of workers and after any number of kills.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from conf.errors import UserError
from data_pipeline.corpus import read
from data_pipeline.corpus.document import Dropped
from data_pipeline.corpus.inputs import Input
from data_pipeline.corpus.read import empty, inputs, records
from data_pipeline.corpus.remote_inputs import fetched
from data_pipeline.corpus.report import Report
from data_pipeline.files import rename
from data_pipeline.manifest import (
    FORMAT,
    SPLITS,
    Block,
    ShardIndex,
    ShardInfo,
    encode_block,
    index_name,
    provenance,
    write_index,
)
from data_pipeline.remote.backends import is_remote, shown
from data_pipeline.shards import encode
from data_pipeline.shards.encode import Encoded, Encoding, Work, encode_all, tasks
from data_pipeline.shards.output import Finished, Position, Progress, dtype_of, finish, listing, open_output
from data_pipeline.shards.shards_config import ImportConfig, ShardsConfig
from data_pipeline.tokenizer.tokenizer import Tokenizer
from data_pipeline.tokenizer.vocabularies import EOT

MIN_WORKER_BYTES = 16 << 20  # of input; for less, starting a process costs more than it saves


class ShardWriter:
    """One shard: written to a staging file document by document, then published whole with its index."""

    def __init__(self, folder: Path, number: int, block_tokens: int) -> None:
        import webdataset as wds  # brings torch

        folder.mkdir(exist_ok=True)
        self.path = folder / f"{number:05d}.tar"
        self.block_tokens = block_tokens
        self.staging = self.path.with_name(f".{self.path.name}.tmp")
        self.file = self.staging.open("wb")
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

    def publish(self, end: Position) -> Finished:
        self._write_block()
        self.tar.close()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        with self.staging.open("rb") as f:
            sha256 = hashlib.file_digest(f, "sha256").hexdigest()
        info = ShardInfo(self.path.name, self.staging.stat().st_size, sha256, len(self.documents), self.tokens)
        ids, counts = zip(*self.documents, strict=True)
        index = ShardIndex(tuple(self.blocks), ids, counts, sha256)
        write_index(self.path.with_name(index_name(self.path.name)), index)
        rename(self.staging, self.path)
        return Finished(info, end, self.unknown)

    def _write_block(self) -> None:
        key = f"{len(self.blocks):06d}"
        ids = np.concatenate([ids for _, ids in self.held])
        about = provenance([origin for origin, _ in self.held], [len(ids) for _, ids in self.held])
        npy = encode_block(ids)
        self.tar.write({"__key__": key, "npy": npy, "json": about})
        # TarWriter sorts: the .npy is the last member, padded to whole records, and the tokens are the end of it.
        offset = self.tar.tarstream.offset + -len(npy) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE + len(npy) - ids.nbytes
        self.blocks.append(Block(f"{key}.npy", len(ids), zlib.crc32(ids.tobytes()), offset))
        self.held = []
        self.held_tokens = 0


def write(cfg: ShardsConfig) -> None:
    """Write the shards, continue an interrupted write, or report that all are written.

    Raises:
        UserError: no input, an output that cannot be written, or one that holds other work.
    """
    tokenizer = Tokenizer.load(cfg.tokenizer)
    files = inputs(cfg.corpus)
    with open_output(Path(cfg.output), _plan(cfg, tokenizer, files)) as progress:
        if progress.done:
            return
        if tokenizer.engine == "tokenizers" and tokenizer.byte_level:
            print("fastokens is not installed: the same ids, 30 times slower (pip install fastokens)", file=sys.stderr)
        if tokenizer.eot_id is None:
            print(f"tokenizer={cfg.tokenizer} has no {EOT}: documents are packed without a separator", file=sys.stderr)
        report = pack(cfg, _encoded(cfg, tokenizer, files, progress), progress, cfg.corpus.name, files)
        report.print()
        kept = report.given.documents
        if not kept:
            raise empty(cfg.corpus, report)
        if not progress.shards["train"]:
            raise UserError(
                f"val_fraction={cfg.val_fraction}: all {kept} documents fell into validation, none is left to "
                f"train on: give a smaller val_fraction, or a corpus of more documents"
            )
        finish(cfg.corpus.name, tokenizer, progress, report.totals())
        if not progress.shards["val"]:
            print(
                f"val_fraction={cfg.val_fraction}: none of the {kept} documents fell into validation, there is "
                f"no {progress.folder / 'val'}, which trainer.pretrain needs: give a larger val_fraction and another "
                f"output=",
                file=sys.stderr,
            )


def _plan(cfg: ShardsConfig, tokenizer: Tokenizer, files: list[Input]) -> dict[str, Any]:
    """Everything that the bytes of the output depend on."""
    return {
        "format": FORMAT,
        "corpus": cfg.corpus.name,
        "corpus.format": cfg.corpus.format.value,
        "corpus.path": cfg.corpus.path and _place(cfg.corpus.path),
        "corpus.text_key": cfg.corpus.text_key,
        "corpus.id_key": cfg.corpus.id_key,
        "corpus files (names, sizes, times)": listing(files),
        "tokenizer": f"sha256 {tokenizer.sha256}",
        "val_fraction": cfg.val_fraction,
        "shard_tokens": cfg.shard_tokens,
        "block_tokens": cfg.block_tokens,
        "task, block, line, file bytes of this version": [encode.TASK, read.BLOCK, read.MAX_LINE, read.MAX_FILE],
    }


def _place(path: str) -> str:
    return shown(path) if is_remote(path) else str(Path(path).resolve())


def _encoded(cfg: ShardsConfig, tokenizer: Tokenizer, files: list[Input], progress: Progress) -> Work:
    cores = len(os.sched_getaffinity(0))
    workers = cfg.workers or min(cores, 1 + sum(f.size for f in files) // MIN_WORKER_BYTES)
    finished = {split: progress.end(split) for split in SPLITS}
    encoding = Encoding(cfg.corpus, tokenizer.raw, dtype_of(tokenizer), cfg.val_fraction, finished)
    here = (fetched(file, progress.folder / "inputs") for file in files)
    return encode_all(encoding, tasks(records(cfg.corpus, here)), workers)


def pack(cfg: ShardsConfig | ImportConfig, work: Work, progress: Progress, name: str, files: list[Input]) -> Report:
    """Put documents into shards and add each full one to `progress`; documents without ids are only counted."""
    from tqdm import tqdm

    report = Report()
    shards: dict[str, ShardWriter] = {}
    documents = tokens = last = 0
    every = 0.5 if sys.stderr.isatty() else 30.0
    with tqdm(total=sum(f.size for f in files), unit="B", unit_scale=True, desc=name, mininterval=every) as bar:
        for task, items in work:
            for item in items:
                if isinstance(item, Dropped):
                    report.drop_record(item)
                    continue
                report.count_documents(1)
                if item.ids is None:
                    continue
                split = item.split
                if split not in shards:
                    number = len(progress.shards[split])
                    shards[split] = ShardWriter(progress.folder / split, number, cfg.block_tokens)
                shards[split].add(item, item.ids)
                documents, tokens = documents + 1, tokens + len(item.ids)
                if shards[split].tokens >= cfg.shard_tokens:
                    end = (item.position[0], item.position[1] + 1)
                    progress.add(split, shards.pop(split).publish(end))
            seconds = max(bar.format_dict["elapsed"], 1e-9)
            bar.set_postfix_str(
                f"{documents / seconds:,.0f} documents/s, {tokens / seconds:,.0f} tokens/s", refresh=False
            )
            bar.update(task.size)
            last = task.number
    for split, shard in shards.items():
        progress.add(split, shard.publish((last + 1, 0)))
    return report
