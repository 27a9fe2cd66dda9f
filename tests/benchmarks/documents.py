"""A corpus of random documents, made once in a folder, in the form on disk that each loader reads.

    flat       train.bin, all tokens one after another (nanoGPT's form); documents.npy, where each document ends
    shards     this project's, through its own ShardWriter
    mds        mosaicml-streaming's, ready-cut windows of N_CTX + 1 tokens
    documents  webdataset tars, one .npy for each document

A form is made aside and renamed; one that is there is used again. All hold the same tokens in the same order.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

N_CTX = 1024
VOCAB, EOT = 50257, 50256  # GPT-2's
MEAN, SPREAD = 1074, 1.0  # tokens of a document: a lognormal's mean and sigma
TAR_TOKENS = 5_000_000  # of a webdataset tar, as of our shards
ABOUT = "corpus.json"


def prepare(folder: Path, form: str, tokens: int, seed: int) -> None:
    """Make `form` in `folder`, where it is not there yet.

    Raises:
        SystemExit: the folder holds another corpus.
    """
    folder.mkdir(parents=True, exist_ok=True)
    about = {"tokens": tokens, "seed": seed, "n_ctx": N_CTX, "mean": MEAN, "spread": SPREAD, "version": 1}
    if not (folder / ABOUT).exists():
        if any(folder.iterdir()):
            raise SystemExit(f"error: dir={folder} is neither empty nor a corpus of this benchmark: give another")
        (folder / ABOUT).write_text(json.dumps(about))
    elif json.loads((folder / ABOUT).read_text()) != about:
        raise SystemExit(f"error: dir={folder} holds another corpus than {about}: give another, or remove it")
    if not (folder / form).exists():
        aside = folder / f".{form}.tmp"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        if form == "flat":
            write_flat(aside, tokens, seed)
        else:
            FORMS[form](aside, folder / "flat")
        aside.rename(folder / form)


def size(folder: Path) -> int:
    """Bytes of all files below `folder`, indexes and all that a loader needs included."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def documents(flat: Path) -> Iterator[np.ndarray]:
    """Each document's tokens, [n] uint16, the end-of-text token last."""
    data, start = open_flat(flat), 0
    for stop in np.load(flat / "documents.npy").tolist():
        yield data[start:stop]
        start = stop


def open_flat(flat: Path) -> np.memmap:
    return np.memmap(flat / "train.bin", dtype=np.uint16, mode="r")


def write_flat(folder: Path, tokens: int, seed: int) -> None:
    """Ids by Zipf's law (the chance of id i is about 1 / (i + 1)), lengths lognormal; the last is cut to fit."""
    rng = np.random.default_rng(seed)
    many = max(64, 2 * tokens // MEAN)
    lengths = np.maximum(2, rng.lognormal(np.log(MEAN) - SPREAD**2 / 2, SPREAD, many).astype(np.int64))
    while lengths.sum() < tokens:
        lengths = np.append(lengths, lengths)
    ends = np.cumsum(lengths)
    ends = np.append(ends[ends < tokens], tokens)
    with (folder / "train.bin").open("wb") as f:
        for first in range(0, tokens, 1 << 20):
            draw = rng.random(min(1 << 20, tokens - first))
            ids = (np.exp(draw * np.log(EOT + 1)) - 1).astype(np.uint16)
            closed = ends[(ends > first) & (ends <= first + len(ids))]
            ids[closed - 1 - first] = EOT
            f.write(ids.tobytes())
    np.save(folder / "documents.npy", ends)


def write_shards(folder: Path, flat: Path) -> None:
    """Through the writer that `data_pipeline.shards write` uses; origins as of JSON lines without ids."""
    from data_pipeline.manifest import TOKENIZER, Manifest, ShardInfo, write_manifest
    from data_pipeline.shards.encode import Encoded
    from data_pipeline.shards.shards_config import ShardsConfig
    from data_pipeline.shards.write import ShardWriter

    cfg = ShardsConfig(tokenizer="gpt2", output=str(folder))
    shards: list[ShardInfo] = []
    writer = None
    for number, ids in enumerate(documents(flat)):
        writer = writer or ShardWriter(folder, len(shards), cfg.block_tokens)
        where = f"part.jsonl:{number}"
        origin = {"id": where, "source": "benchmark", "path": where}
        writer.add(Encoded("train", (0, number), origin, ids), ids)
        if writer.tokens >= cfg.shard_tokens:
            shards.append(writer.publish((0, number + 1)).info)
            writer = None
    if writer is not None:
        shards.append(writer.publish((0, number + 1)).info)
    (folder / TOKENIZER).write_text("{}")  # no token of a random corpus is ever decoded
    write_manifest(Manifest(folder, "benchmark", "train", "uint16", VOCAB, EOT, "0" * 64, tuple(shards)))


def write_mds(folder: Path, flat: Path) -> None:
    from streaming import MDSWriter

    data = open_flat(flat)
    with MDSWriter(out=str(folder), columns={"tokens": f"ndarray:uint16:{N_CTX + 1}"}) as out:
        for start in range(0, len(data) - N_CTX, N_CTX):
            out.write({"tokens": np.asarray(data[start : start + N_CTX + 1])})


def write_documents(folder: Path, flat: Path) -> None:
    """Times in whole seconds: webdataset's own fractions cost each member another header, on disk and in reading."""
    from webdataset import TarWriter

    tar, held, tars = None, 0, 0
    for number, ids in enumerate(documents(flat)):
        if tar is None:
            tar, held, tars = TarWriter(str(folder / f"{tars:05d}.tar"), encoder=False, mtime=0), 0, tars + 1
        npy = io.BytesIO()
        np.lib.format.write_array(npy, np.asarray(ids), allow_pickle=False)
        tar.write({"__key__": f"{number:09d}", "npy": npy.getvalue()})
        held += len(ids)
        if held >= TAR_TOKENS:
            tar.close()
            tar = None
    if tar is not None:
        tar.close()


FORMS: dict[str, Callable[[Path, Path], None]] = {
    "shards": write_shards,
    "mds": write_mds,
    "documents": write_documents,
}

if __name__ == "__main__":
    from tests.benchmarks.engines import with_peer

    root, wanted, number_of_tokens, seed_, peer = sys.argv[1:]
    with_peer(peer)
    prepare(Path(root), wanted, int(number_of_tokens), int(seed_))
