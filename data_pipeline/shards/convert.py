"""Other programs' token files -> a source (import), and back (export). The ids stay as they are; nothing is tokenized.

An import fills one folder, OUTPUT/train or OUTPUT/val, and goes on after a kill as `shards write` does. A document is
a document of that format, or (nanoGPT, packed=true) the tokens between two ends of text.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from conf.errors import UserError, of_nature
from data_pipeline.corpus.document import Dropped
from data_pipeline.corpus.inputs import Input
from data_pipeline.corpus.read import MAX_LINE
from data_pipeline.files import rename
from data_pipeline.manifest import FORMAT, Manifest, index_of, read_manifest
from data_pipeline.shards.encode import Encoded, Task, Work
from data_pipeline.shards.output import Position, claimed, dtype_of, finish, listing, open_output
from data_pipeline.shards.pieces import MAX_TOKENS, Piece, checked, cut
from data_pipeline.shards.shards_config import ExportConfig, ExportFormat, ImportConfig, TokenFormat
from data_pipeline.shards.token_files import CHUNK, MEGATRON, inputs, pieces
from data_pipeline.shards.write import pack
from data_pipeline.stream.windows import read_shard
from data_pipeline.tokenizer.tokenizer import Tokenizer
from data_pipeline.tokenizer.vocabularies import EOT

TASK = 1 << 20  # tokens that are handed over at once
ITEMS = 1 << 16  # or documents, if they are very short
OWN_FOLDER = "."  # the one split of an import is its own folder


def import_(cfg: ImportConfig) -> None:
    """Write the shards, continue an interrupted import, or report that all are written.

    Raises:
        UserError: nothing to read, a damaged file, an id outside the vocabulary, or an output that holds other work.
    """
    tokenizer = Tokenizer.load(cfg.tokenizer)
    files = inputs(cfg)
    counts = {"end_of_text_added": 0, "end_of_text_inside": 0}
    with open_output(Path(cfg.output) / cfg.split.value, _plan(cfg, tokenizer, files), (OWN_FOLDER,)) as progress:
        if progress.done:
            return
        if tokenizer.eot_id is None:
            print(f"tokenizer={cfg.tokenizer} has no {EOT}: documents are packed without a separator", file=sys.stderr)
        documents = _documents(cfg, tokenizer, files)
        work = _tasks(cfg, tokenizer, documents, progress.end(OWN_FOLDER), counts)
        report = pack(cfg, work, progress, cfg.format.value, files)
        report.print()
        if not report.given.documents:
            raise UserError(
                f"input={cfg.input}: no document in it ({report.summary()}): give {cfg.format.value} files with ids"
            )
        if tokenizer.eot_id is not None:
            print(f"  {counts['end_of_text_added']:>12,}  documents without {EOT} got one", file=sys.stderr)
        if counts["end_of_text_inside"]:
            print(
                f"  {counts['end_of_text_inside']:>12,}  {EOT} inside documents; if these are pieces of one stream, "
                f"packed=true cuts it there",
                file=sys.stderr,
            )
        finish(cfg.format.value, tokenizer, progress, report.totals() | counts)


def _plan(cfg: ImportConfig, tokenizer: Tokenizer, files: list[Input]) -> dict[str, Any]:
    """Everything that the bytes of the output depend on."""
    return {
        "format": FORMAT,
        "import": cfg.format.value,
        "input": str(Path(cfg.input).resolve()),
        "input files (names, sizes, times)": listing(files),
        "tokenizer": f"sha256 {tokenizer.sha256}",
        "packed": cfg.packed,
        "dtype": cfg.dtype and cfg.dtype.value,
        "tokens_key": cfg.tokens_key,
        "id_key": cfg.id_key,
        "shard_tokens": cfg.shard_tokens,
        "block_tokens": cfg.block_tokens,
        "task, chunk, document, line of this version": [TASK, ITEMS, CHUNK, MAX_TOKENS, MAX_LINE],
    }


def _documents(cfg: ImportConfig, tokenizer: Tokenizer, files: list[Input]) -> Iterator[Piece | Dropped]:
    dtype = dtype_of(tokenizer)
    for name, stream in pieces(cfg, files):
        good = (checked(piece, tokenizer.vocab_size, dtype) for piece in stream)
        try:
            yield from cut(name, good, tokenizer.eot_id) if cfg.packed or cfg.format is TokenFormat.nanogpt else good
        except OSError as e:
            raise of_nature(e, f"input={cfg.input}: {name} cannot be read: {e.strerror or e}") from None


def _tasks(
    cfg: ImportConfig,
    tokenizer: Tokenizer,
    documents: Iterator[Piece | Dropped],
    finished: Position,
    counts: dict[str, int],
) -> Work:
    """Documents with their end-of-text, in the same tasks whether or not an earlier start was killed."""
    number = held = size = 0
    items: list[Encoded | Dropped] = []
    eot = np.array([] if tokenizer.eot_id is None else [tokenizer.eot_id], dtype_of(tokenizer))
    for piece in documents:
        if isinstance(piece, Piece) and not len(piece.ids):
            piece = Dropped("empty", piece.path)
        if isinstance(piece, Dropped):
            items.append(piece)
        else:
            origin = {"id": piece.id, "source": cfg.format.value, "path": piece.path}
            ids, position = piece.ids, (number, len(items))
            inside = 0 if tokenizer.eot_id is None else int(np.count_nonzero(ids[:-1] == tokenizer.eot_id))
            counts["end_of_text_inside"] += inside
            if len(eot) and ids[-1] != eot[0]:
                ids = np.concatenate([ids, eot])
                counts["end_of_text_added"] += 1
            unknown = 0 if tokenizer.unk_id is None else int(np.count_nonzero(ids == tokenizer.unk_id))
            items.append(Encoded(OWN_FOLDER, position, origin, ids if position >= finished else None, unknown))
            held, size = held + len(ids), size + piece.size
        if held >= TASK or len(items) >= ITEMS:
            yield Task(number, [], size), items
            number, held, size, items = number + 1, 0, 0, []
    if items:
        yield Task(number, [], size), items


def export(cfg: ExportConfig) -> None:
    """Write all tokens to one .bin in the order of the manifest, and for Megatron the .idx next to it.

    Raises:
        UserError: no source, a damaged one, or an output file that exists already.
    """
    manifest, out = read_manifest(cfg.path), Path(cfg.output)
    parts = [out, *([out.with_suffix(".idx")] if cfg.format is ExportFormat.megatron else [])]
    for path in parts:
        if path.exists():
            raise UserError(f"output={out}: {path} is there already: give another name, or delete it")
    if len(parts) > 1 and manifest.vocab_size > 1 << 31:
        raise UserError(f"{manifest.root}: ids of a vocabulary of {manifest.vocab_size} do not fit Megatron's int32")
    try:
        with claimed(out.parent):
            _publish(manifest, parts)
    except OSError as e:
        raise of_nature(e, f"output={out}: {e.strerror or e}: make room or fix it, then run the same again") from None
    counts = f"{manifest.documents:,} documents, {manifest.tokens:,} tokens"
    print(f"{' and '.join(map(str, parts))}: {counts}, {_note(cfg, manifest)}")


def _publish(manifest: Manifest, parts: list[Path]) -> None:
    staging = [path.with_name(f".{path.name}.tmp") for path in parts]  # a killed export's are overwritten
    try:
        for write, temporary in zip((_write_bin, _write_idx), staging, strict=False):
            with temporary.open("wb") as f:
                write(f, manifest)
                f.flush()
                os.fsync(f.fileno())
        for temporary, path in zip(staging, parts, strict=True):
            rename(temporary, path)
    finally:
        for temporary in staging:
            temporary.unlink(missing_ok=True)


def _note(cfg: ExportConfig, manifest: Manifest) -> str:
    if cfg.format is ExportFormat.megatron:
        return "uint16" if manifest.dtype == "uint16" else "int32"
    ends = "" if manifest.eot_id is not None else f"; nothing marks where documents end, the vocabulary has no {EOT}"
    if manifest.dtype == "uint16":
        return f"uint16, as nanoGPT reads{ends}"
    return f"uint32: nanoGPT reads uint16, change its np.memmap to dtype=np.uint32{ends}"


def _write_bin(f: IO[bytes], manifest: Manifest) -> None:
    from tqdm import tqdm

    every = 0.5 if sys.stderr.isatty() else 30.0
    with tqdm(total=manifest.tokens, unit="token", unit_scale=True, desc="export", mininterval=every) as bar:
        for shard in manifest.shards:
            f.write(read_shard(manifest, shard).data)
            bar.update(shard.tokens)


def _write_idx(f: IO[bytes], manifest: Manifest) -> None:
    """Megatron's index: one sequence for each document."""
    lengths = np.empty(manifest.documents, np.int32)
    filled = 0
    for shard in manifest.shards:
        tokens = index_of(manifest, shard).document_tokens
        if max(tokens, default=0) >= 1 << 31:
            raise UserError(f"{manifest.root}: a document of {max(tokens)} tokens does not fit Megatron's int32")
        lengths[filled : filled + len(tokens)] = tokens
        filled += len(tokens)
    f.write(MEGATRON + bytes([8 if manifest.dtype == "uint16" else 4]))
    f.write(np.array([len(lengths), len(lengths) + 1], "<u8").tobytes())
    f.write(lengths.astype("<i4").data)
    end = 0
    for first in range(0, len(lengths), CHUNK):
        ends = end + np.cumsum(lengths[first : first + CHUNK], dtype="<i8") * manifest.numpy_dtype.itemsize
        f.write(np.concatenate([[end], ends[:-1]]).astype("<i8").tobytes())
        end = int(ends[-1])
    for first in range(0, len(lengths) + 1, CHUNK):
        f.write(np.arange(first, min(first + CHUNK, len(lengths) + 1), dtype="<i8").tobytes())
