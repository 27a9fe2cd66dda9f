"""Token files of other programs: what comes in is what goes out, whoever wrote it and whoever reads it."""

from __future__ import annotations

import gzip
import itertools
import json
import struct
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import zstandard

from conf.errors import UserError
from data_pipeline import files
from data_pipeline.corpus.corpus_config import CorpusConfig, CorpusFormat
from data_pipeline.manifest import index_path, read_index, read_manifest
from data_pipeline.shards import convert, pieces
from data_pipeline.shards import token_files as tokens
from data_pipeline.shards import write as shards
from data_pipeline.shards.shards_config import (
    ExportConfig,
    ExportFormat,
    ImportConfig,
    ShardsConfig,
    Split,
    TokenFormat,
    VerifyConfig,
    Width,
)
from data_pipeline.shards.verify import verify
from data_pipeline.stream.windows import read_shard
from data_pipeline.tokenizer.tokenizer import train_bpe
from tests.helpers.fixtures import forestalled
from tests.helpers.seeds import seeded
from tests.unit.data_pipeline.shards.test_shards import tree

EOT = 256
Documents = list[np.ndarray]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Vocabularies of 60,000 and of 70,000 ids, whose end-of-text is 256, and one of 256 without."""
    home, body = tmp_path_factory.mktemp("home"), json.loads(train_bpe(["abab"], 257).raw)
    token = body["added_tokens"][0]
    for size in (60_000, 70_000):
        body["added_tokens"] = [token, {**token, "content": "<|last|>", "id": size - 1}]
        (home / f"{size}.json").write_text(json.dumps(body))
    body["added_tokens"] = []
    body["model"]["vocab"].pop("<|endoftext|>", None)
    (home / "256.json").write_text(json.dumps(body))
    return home


def config(home: Path, source: Path, out: Path, kind: str, vocab: int = 60_000, **change: object) -> ImportConfig:
    values = {"shard_tokens": 3000, "block_tokens": 700, **change}
    return ImportConfig(TokenFormat(kind), str(source), str(home / f"{vocab}.json"), str(out), **values)  # type: ignore[arg-type]


def random_documents(seed: int, vocab: int = 60_000, n: int = 80) -> Documents:
    """Each with its end-of-text; many are nothing else, one is longer than a block."""
    rng = np.random.default_rng(seed)
    lengths = [*rng.integers(0, 300, n), *[0] * 5, 1500]
    out = []
    for length in rng.permutation(lengths):
        ids = rng.integers(0, vocab, length)
        out.append(np.append(np.where(ids == EOT, 0, ids), EOT))
    return out


def documents_of(source: Path) -> dict[str, list[int]]:
    """{id: tokens} of a source that verify finds whole."""
    verify(VerifyConfig(str(source)))
    found, out = read_manifest(source), {}
    for shard in found.shards:
        index = read_index(index_path(found, shard))
        parts = np.split(read_shard(found, shard), np.cumsum(index.document_tokens)[:-1])
        out.update({name: part.tolist() for name, part in zip(index.document_ids, parts, strict=True)})
    return out


def numbered(name: str, documents: Documents) -> dict[str, list[int]]:
    return {f"{name}:{i}": ids.tolist() for i, ids in enumerate(documents)}


def write_megatron(prefix: Path, documents: Documents, dtype: type, rng: np.random.Generator) -> None:
    """By megatron-core's own writer, each document in sequences of any number and length."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    from torch import tensor

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for ids in documents:
        cuts = np.sort(rng.integers(0, len(ids) + 1, rng.integers(0, 3)))
        builder.add_document(tensor(ids), np.diff([0, *cuts, len(ids)]).tolist())
    builder.finalize(f"{prefix}.idx")


def write_mds(
    out: Path, samples: Sequence[bytes], encoding: str, compression: str | None = None, per_shard: int = 30
) -> None:
    """By the layout that MosaicML publishes; beside `tokens` stand a number and, on either side, columns that vary."""
    names, kinds = ["about", "number", "tokens", "zlast"], ["str", "int", encoding, "pkl"]
    size = len(samples[0]) if encoding.count(":") == 2 else None
    columns = {"column_names": names, "column_encodings": kinds, "column_sizes": [None, 8, size, None]}
    pack = {None: bytes, "gz": gzip.compress, "zstd:3": zstandard.compress}[compression]
    found = []
    out.mkdir()
    for first in range(0, len(samples), per_shard):
        bodies = []
        for i, ids in enumerate(samples[first : first + per_shard]):
            data = ["ü".encode() * i, struct.pack("<q", i), ids, b"cos\nsystem\n"]
            sizes = [len(d) for d, s in zip(data, columns["column_sizes"], strict=True) if s is None]
            bodies.append(np.array(sizes, "<u4").tobytes() + b"".join(data))
        about = json.dumps(columns).encode()
        offsets = 4 * (len(bodies) + 2) + len(about) + np.cumsum([0, *map(len, bodies)])
        raw = struct.pack("<I", len(bodies)) + offsets.astype("<u4").tobytes() + about + b"".join(bodies)
        name = f"shard.{len(found):05d}.mds"
        packed = f"{name}.{compression.split(':')[0]}" if compression else name
        (out / packed).write_bytes(pack(raw))
        files = {"raw_data": {"basename": name, "bytes": len(raw), "hashes": {}}, "zip_data": None}
        if compression:
            files["zip_data"] = {"basename": packed, "bytes": len(pack(raw)), "hashes": {}}
        about_shard = {"format": "mds", "version": 2, "samples": len(bodies), "compression": compression}
        found.append({**about_shard, **columns, **files, "hashes": [], "size_limit": 1 << 26})
    (out / "index.json").write_text(json.dumps({"version": 2, "shards": found}))


@pytest.mark.parametrize(("vocab", "dtype"), [(60_000, "uint16"), (70_000, "uint32")])
def test_a_nanogpt_file_becomes_documents_and_the_file_again(
    home: Path, tmp_path: Path, vocab: int, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    seed = seeded()
    documents = random_documents(seed, vocab)
    np.concatenate(documents).astype(dtype).tofile(tmp_path / "train.bin")
    cfg = config(home, tmp_path / "train.bin", tmp_path / "out", "nanogpt", vocab, dtype=Width(dtype))
    convert.import_(cfg)
    assert documents_of(tmp_path / "out/train") == numbered("train.bin", documents), f"seed {seed}"
    assert len(read_manifest(tmp_path / "out/train").shards) > 2
    before = tree(tmp_path / "out")
    convert.import_(cfg)
    assert "already complete (train " in capsys.readouterr().out and tree(tmp_path / "out") == before
    convert.export(ExportConfig(str(tmp_path / "out/train"), str(tmp_path / "new/back.bin")))
    assert (dtype == "uint16") == ("uint16, as nanoGPT reads" in capsys.readouterr().out)
    read_as_nanogpt_does = np.memmap(tmp_path / "new/back.bin", dtype=dtype, mode="r")
    assert np.array_equal(read_as_nanogpt_does, np.concatenate(documents)), f"seed {seed}"
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["back.bin"]
    with pytest.raises(UserError, match=r"back.bin is there already: give another name"):
        convert.export(ExportConfig(str(tmp_path / "out/train"), str(tmp_path / "new/back.bin")))


@pytest.mark.parametrize("most", [65, 60_000, 130_000])
@pytest.mark.parametrize("dtype", ["uint32", "int64"])
def test_wide_ids_are_not_read_as_uint16(home: Path, tmp_path: Path, most: int, dtype: str) -> None:
    ids = np.random.default_rng(seeded()).integers(0, most, 5000)
    ids.astype(dtype).tofile(tmp_path / "train.bin")
    with pytest.raises(UserError, match=f"train.bin: every other id .* reads as {dtype}: give dtype={dtype}, or dtype"):
        convert.import_(config(home, tmp_path / "train.bin", tmp_path / "out", "nanogpt"))


@pytest.mark.parametrize("most", [2, 4, 65, 300, 60_000])
def test_narrow_ids_are_read_as_uint16(home: Path, tmp_path: Path, most: int) -> None:
    """Without dtype, also those of few values; and given as uint16 all are."""
    ids = np.random.default_rng(seeded()).integers(0, most, 5000)
    for name, dtype, given, count in (("a", "uint16", None, 5000), ("b", "uint32", Width.uint16, 10_000)):
        ids.astype(dtype).tofile(tmp_path / f"{name}.bin")
        convert.import_(config(home, tmp_path / f"{name}.bin", tmp_path / name, "nanogpt", dtype=given))
        assert count <= read_manifest(tmp_path / name / "train").tokens <= count + 1


@pytest.mark.parametrize(("magic", "version", "dtype"), [(20240520, 1, "<u2"), (20240801, 7, "<u4")])
def test_a_file_with_llm_cs_header_says_its_width_itself(
    home: Path, tmp_path: Path, magic: int, version: int, dtype: str
) -> None:
    seed = seeded()
    documents = random_documents(seed)
    ids = np.concatenate(documents).astype(dtype)
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.bin").write_bytes(header.tobytes() + ids.tobytes())
    (tmp_path / "in/meta.pkl").write_bytes(b"cos\nsystem\n")
    convert.import_(config(home, tmp_path / "in", tmp_path / "out", "nanogpt", split=Split.val))
    assert documents_of(tmp_path / "out/val") == numbered("a.bin", documents), f"seed {seed}"
    report = json.loads((tmp_path / "out/val/report.json").read_text())
    assert report["dropped"] == {"not a .bin file": {"count": 1, "examples": ["meta.pkl"]}}


@pytest.mark.parametrize(("vocab", "dtype"), [(60_000, np.uint16), (70_000, np.int32)])
def test_megatron_files_come_in_and_go_out(home: Path, tmp_path: Path, vocab: int, dtype: type) -> None:
    """Megatron's own files are imported, and Megatron reads what is exported."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    seed = seeded()
    documents = random_documents(seed, vocab)
    (tmp_path / "in").mkdir()
    write_megatron(tmp_path / "in/text_document", documents, dtype, np.random.default_rng(seed))
    expected = numbered("text_document.bin", documents)
    for i, given in enumerate(["in", "in/text_document", "in/text_document.bin", "in/text_document.idx"]):
        convert.import_(config(home, tmp_path / given, tmp_path / f"out{i}", "megatron", vocab))
        assert documents_of(tmp_path / f"out{i}/train") == expected, f"seed {seed}, {given}"
    convert.export(ExportConfig(str(tmp_path / "out0/train"), str(tmp_path / "back.bin"), ExportFormat.megatron))
    peer = IndexedDataset(str(tmp_path / "back"))
    assert peer.index.dtype is dtype and len(peer) == len(documents)
    assert peer.document_indices.tolist() == list(range(len(documents) + 1))
    for i, ids in enumerate(documents):
        assert peer.get(i).tolist() == ids.tolist(), f"seed {seed}, document {i}"


def as_ndarray(ids: np.ndarray, dtype: str) -> bytes:
    """MosaicML's ndarray whose shape is not said elsewhere."""
    width = 0 if len(ids) < 256 else 1
    return bytes([1 << 2 | width]) + len(ids).to_bytes(width + 1, "little") + ids.astype(dtype).tobytes()


MDS: dict[str, Callable[[np.ndarray], bytes]] = {
    "ndarray:uint16": lambda ids: as_ndarray(ids, "<u2"),
    "ndarray:int64": lambda ids: as_ndarray(ids, "<i8"),
    "ndarray": lambda ids: bytes([32]) + as_ndarray(ids, "<u4"),
    "bytes": lambda ids: ids.astype("<i8").tobytes(),
    "ndarray:int32:200": lambda ids: ids.astype("<i4").tobytes(),
}


@pytest.mark.parametrize("compression", [None, "gz", "zstd:3"])
@pytest.mark.parametrize("encoding", MDS)
def test_mds_samples_are_documents(home: Path, tmp_path: Path, encoding: str, compression: str | None) -> None:
    """Of each encoding and compression."""
    seed = seeded()
    documents = random_documents(seed)
    if encoding.endswith(":200"):
        documents = np.split(np.random.default_rng(seed).integers(257, 60_000, 40 * 200), 40)
    write_mds(tmp_path / "in", [MDS[encoding](ids) for ids in documents], encoding, compression)
    dtype = Width.int64 if encoding == "bytes" else None
    convert.import_(config(home, tmp_path / "in", tmp_path / "out", "mds", dtype=dtype))
    expected = {f"shard.{i // 30:05d}.mds:{i % 30}": ids.tolist() for i, ids in enumerate(documents)}
    if encoding.endswith(":200"):  # pieces of a fixed length seldom end with end-of-text
        expected = {name: [*ids, EOT] for name, ids in expected.items()}
    assert documents_of(tmp_path / "out/train") == expected, f"seed {seed}"


@pytest.mark.parametrize("compression", [None, "gz", "zstd:3"])
@pytest.mark.parametrize("encoding", ["ndarray:uint16", "ndarray", "bytes", "ndarray:int32:64"])
def test_what_mosaicmls_writer_wrote_comes_in(
    home: Path, tmp_path: Path, encoding: str, compression: str | None
) -> None:
    reason = "mosaicml-streaming is not installed: the tests above write its layout themselves"
    streaming = pytest.importorskip("streaming", reason=reason)
    seed = seeded()
    documents = random_documents(seed)
    if encoding.endswith(":64"):
        documents = [np.append(ids, EOT) for ids in np.random.default_rng(seed).integers(257, 60_000, (90, 63))]
    columns = {"tokens": encoding, "name": "str", "weight": "float32"}
    cast = {"ndarray:int32:64": "int32", "bytes": "int64"}.get(encoding, "uint16")
    with streaming.MDSWriter(
        out=str(tmp_path / "in"), columns=columns, compression=compression, size_limit=9000
    ) as writer:
        for i, ids in enumerate(documents):
            value = ids.astype(cast)
            writer.write({"tokens": value.tobytes() if encoding == "bytes" else value, "name": f"n{i}", "weight": 0.5})
    dtype = Width.int64 if encoding == "bytes" else None
    convert.import_(config(home, tmp_path / "in", tmp_path / "out", "mds", dtype=dtype))
    found = documents_of(tmp_path / "out/train")
    assert list(found.values()) == [ids.tolist() for ids in documents], f"seed {seed}"
    assert len({name.split(":")[0] for name in found}) > 2


@pytest.mark.parametrize("kind", ["mds", "megatron", "jsonl"])
def test_pieces_of_a_packed_stream_are_cut_at_end_of_text(home: Path, tmp_path: Path, kind: str) -> None:
    seed = seeded()
    documents = [*random_documents(seed), np.array([1, 2, EOT])]  # the last is told without its end-of-text
    rng = np.random.default_rng(seed)
    pieces = np.split(np.concatenate(documents)[:-1], np.sort(rng.integers(0, sum(map(len, documents)), 50)))
    pieces = [piece for piece in pieces if len(piece)]
    if kind == "mds":
        write_mds(tmp_path / "in", [as_ndarray(piece, "<u2") for piece in pieces], "ndarray:uint16", per_shard=7)
    else:
        (tmp_path / "in").mkdir()
    if kind == "megatron":
        write_megatron(tmp_path / "in/x", pieces, np.int64, rng)
    if kind == "jsonl":
        (tmp_path / "in/x.jsonl").write_text("".join(json.dumps({"tokens": p.tolist()}) + "\n" for p in pieces))
    convert.import_(config(home, tmp_path / "in", tmp_path / "out", kind, packed=True))
    found = documents_of(tmp_path / "out/train")
    assert list(found.values()) == [ids.tolist() for ids in documents], f"seed {seed}"
    report = json.loads((tmp_path / "out/train/report.json").read_text())
    assert (report["end_of_text_added"], report["end_of_text_inside"]) == (1, 0)


def test_lines_of_ids_are_documents_and_what_is_none_is_counted(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ['{"ids": [1, 2, 256]}', '{"ids": [3, 256, 4], "id": "x"}', "{broken", "", '{"ids": []}', '{"ids": [1.5]}']
    lines += [
        '{"ids": [true]}',
        '{"tokens": [1]}',
        "[1]",
        '{"ids": [1], "id": "\\ud800"}',
        '{"ids": "12"}',
        '{"ids": [7]}',
    ]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    convert.import_(config(home, tmp_path / "a.jsonl.gz", tmp_path / "out", "jsonl", tokens_key="ids"))
    assert documents_of(tmp_path / "out/train") == {
        "a.jsonl.gz:1": [1, 2, 256],
        "x": [3, 256, 4, 256],
        "a.jsonl.gz:12": [7, 256],
    }
    report = json.loads((tmp_path / "out/train/report.json").read_text())
    assert {reason: found["count"] for reason, found in report["dropped"].items()} == {
        "empty": 2,
        "no list of ids in the field 'ids'": 5,
        "not JSON": 1,
        "not Unicode (a lone surrogate)": 1,
    }
    assert (report["kept"], report["end_of_text_added"], report["end_of_text_inside"]) == (3, 2, 1)
    err = capsys.readouterr().err
    assert "2  documents without <|endoftext|> got one" in err and "1  <|endoftext|> inside documents" in err
    assert report["train"] == {"documents": 3, "tokens": 9} and report["val"] == {"documents": 0, "tokens": 0}


def test_without_end_of_text_nothing_is_cut_or_added(home: Path, tmp_path: Path) -> None:
    """A vocabulary without end-of-text cuts no document and adds no token."""
    np.arange(256, dtype=np.uint16).tofile(tmp_path / "a.bin")
    convert.import_(config(home, tmp_path / "a.bin", tmp_path / "out", "nanogpt", 256))
    assert documents_of(tmp_path / "out/train") == {"a.bin:0": list(range(256))}


def test_a_too_long_document_is_counted(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other documents stay."""
    documents = [np.array([*range(n), EOT]) for n in (20, 200, 30, 0, 201)]
    (tmp_path / "in").mkdir()
    write_megatron(tmp_path / "in/x", documents, np.uint16, np.random.default_rng(0))
    np.concatenate(documents).astype(np.uint16).tofile(tmp_path / "x.bin")
    for module in (tokens, pieces):
        monkeypatch.setattr(module, "MAX_TOKENS", 100)
    monkeypatch.setattr(tokens, "CHUNK", 64)
    for kind, source in (("megatron", "in/x"), ("nanogpt", "x.bin")):
        convert.import_(config(home, tmp_path / source, tmp_path / kind, kind))
        expected = {name: ids for name, ids in numbered("x.bin", documents).items() if len(ids) < 100}
        assert documents_of(tmp_path / kind / "train") == expected
        report = json.loads((tmp_path / kind / "train/report.json").read_text())
        assert report["dropped"] == {tokens.TOO_LONG: {"count": 2, "examples": ["x.bin:1", "x.bin:4"]}}


def test_a_stopped_import_ends_with_the_same_bytes(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each publication in turn is the one that a kill prevents."""
    seed = seeded()
    np.concatenate(random_documents(seed)).astype(np.uint16).tofile(tmp_path / "a.bin")
    monkeypatch.setattr(convert, "TASK", 500)
    monkeypatch.setattr(tokens, "CHUNK", 100)
    convert.import_(config(home, tmp_path / "a.bin", tmp_path / "whole", "nanogpt"))
    expected, stop_after = tree(tmp_path / "whole"), forestalled(monkeypatch, shards, files)
    for published in itertools.count():
        out = tmp_path / str(published)
        stop_after(published)
        try:
            convert.import_(config(home, tmp_path / "a.bin", out, "nanogpt"))
            break
        except KeyboardInterrupt:
            stop_after(-1)
        convert.import_(config(home, tmp_path / "a.bin", out, "nanogpt"))
        assert tree(out) == expected, f"seed {seed}, stopped before publication {published}"
    assert published > 10
    with pytest.raises(UserError, match=r"begun with block_tokens=700, now block_tokens=600: give another output="):
        convert.import_(config(home, tmp_path / "a.bin", out, "nanogpt", block_tokens=600))
    corpus = CorpusConfig(name="text", format=CorpusFormat.text, path=str(home))
    with pytest.raises(UserError, match=r"train was begun with .*: give another output="):
        shards.write(ShardsConfig(corpus=corpus, tokenizer=str(home / "60000.json"), output=str(out / "train")))


def test_a_stopped_export_leaves_nothing(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is a damaged source exported."""
    np.concatenate(random_documents(0)).astype(np.uint16).tofile(tmp_path / "a.bin")
    convert.import_(config(home, tmp_path / "a.bin", tmp_path / "out", "nanogpt"))
    cfg = ExportConfig(str(tmp_path / "out/train"), str(tmp_path / "new/b.bin"), ExportFormat.megatron)
    theirs = {"c.bin", "b.bin.tmp", ".b.bin.tmp.old", ".b.tmp"}  # of others, beside it
    (tmp_path / "new").mkdir()
    for name in theirs:
        (tmp_path / "new" / name).write_text("years")

    def full(aside: Path, path: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(convert, "rename", full)
        with pytest.raises(UserError, match=r"output=.*b.bin: No space left on device: make room"):
            convert.export(cfg)
    assert {path.name for path in (tmp_path / "new").iterdir()} == theirs
    tar = tmp_path / "out/train/00001.tar"
    data = bytearray(tar.read_bytes())
    data[2000] ^= 1
    tar.write_bytes(data)
    with pytest.raises(UserError, match=r"00001.tar: sample 000000.npy: checksum"):
        convert.export(cfg)
    assert {path.name for path in (tmp_path / "new").iterdir()} == theirs
    assert all((tmp_path / "new" / name).read_text() == "years" for name in theirs)


def test_a_token_costs_about_two_bytes(home: Path, tmp_path: Path) -> None:
    """In documents of a thousand tokens, at most 2.1 bytes each."""
    ids = np.random.default_rng(0).integers(257, 60_000, 1_000_000).astype(np.uint16)
    ids[999::1000] = EOT
    ids.tofile(tmp_path / "openwebtext.bin")
    sizes = {"shard_tokens": 5_000_000, "block_tokens": 65_536}
    convert.import_(config(home, tmp_path / "openwebtext.bin", tmp_path / "out", "nanogpt", **sizes))
    found = read_manifest(tmp_path / "out/train")
    disk = sum(path.stat().st_size for path in (tmp_path / "out/train").glob("00000.*"))
    assert (found.tokens, found.documents) == (1_000_000, 1000) and disk <= 2.1 * found.tokens


def test_the_memory_of_an_import_does_not_grow_with_the_file(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "TASK", 1 << 14)
    monkeypatch.setattr(tokens, "CHUNK", 1 << 14)
    sizes = {"shard_tokens": 100_000, "block_tokens": 20_000}
    peaks = []
    for n in (200_000, 3_200_000):
        ids = np.full(n, 7, np.uint16)
        ids[399::400] = EOT
        ids.tofile(tmp_path / f"{n}.bin")
        tracemalloc.start()
        convert.import_(config(home, tmp_path / f"{n}.bin", tmp_path / str(n), "nanogpt", **sizes))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0] < 6_000_000, peaks
