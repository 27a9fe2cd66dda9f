"""Shards: nothing lost, the same bytes whatever happens on the way, and no damage that verify does not find."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from conf.errors import UserError
from data_pipeline import files
from data_pipeline.corpus import read
from data_pipeline.corpus.corpus_config import CorpusConfig, CorpusFormat
from data_pipeline.manifest import index_path, read_index, read_manifest, write_index
from data_pipeline.order.plan import Windows
from data_pipeline.shards import encode
from data_pipeline.shards import write as shards
from data_pipeline.shards.output import claimed
from data_pipeline.shards.shards_config import ShardsConfig, VerifyConfig
from data_pipeline.shards.verify import verify
from data_pipeline.stream.windows import ShardStream, read_shard
from data_pipeline.tokenizer.tokenizer import Tokenizer, train_bpe
from tests.helpers.fixtures import forestalled

TEXT = "the quick brown fox jumps over a lazy dog while seven other animals watch from their den"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of 400 documents, one longer than a block, and a vocabulary of 400."""
    home = tmp_path_factory.mktemp("home")
    rng, words = random.Random(0), TEXT.split()
    texts = [" ".join(rng.choices(words, k=rng.randrange(1, 60))) + f" {i}" for i in range(400)]
    texts[100] = " ".join(rng.choices(words, k=3000))
    lines = [json.dumps({"text": t, "id": f"doc {i}"}) for i, t in enumerate(texts)]
    lines[50:50] = ["{broken", json.dumps({"text": " "})]
    (home / "corpus.jsonl").write_text("\n".join(lines))
    trained = train_bpe(texts, 400)
    trained.save(home)
    return home


def config(home: Path, out: Path, **change: object) -> ShardsConfig:
    corpus = CorpusConfig(name="jsonl", format=CorpusFormat.jsonl, path=str(home / "corpus.jsonl"))
    values = {"val_fraction": 0.1, "shard_tokens": 2500, "block_tokens": 600, "workers": 1}
    return ShardsConfig(corpus=corpus, tokenizer=str(home), output=str(out), **(values | change))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def written(home: Path) -> Path:
    shards.write(config(home, home / "out"))
    return home / "out"


def texts_of(home: Path) -> dict[str, str]:
    lines = (home / "corpus.jsonl").read_text().splitlines()
    good = [json.loads(line) for line in lines if line != "{broken"]
    return {d["id"]: d["text"] for d in good if d["text"].strip()}


def tree(root: Path) -> dict[str, str]:
    """sha256 of every file."""
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in root.rglob("*") if p.is_file()
    }


def test_every_document_is_in_the_shards_once(home: Path, written: Path) -> None:
    """With its tokens and its origin, in the split that the hash of its text gives."""
    tokenizer, texts, seen = Tokenizer.load(home), texts_of(home), {}
    lines = enumerate((home / "corpus.jsonl").read_text().splitlines(), 1)
    line_of = {json.loads(line).get("id"): n for n, line in lines if line != "{broken"}
    for split in ("train", "val"):
        source = read_manifest(written / split)
        assert Tokenizer.load(source.root).sha256 == source.tokenizer_sha256
        for shard in source.shards:
            index = read_index(index_path(source, shard))
            in_shard = []
            samples = wds.WebDataset(str(source.root / shard.name), shardshuffle=False)
            for sample, block in zip(samples, index.blocks, strict=True):
                ids = np.load(io.BytesIO(sample["npy"]), allow_pickle=False)
                assert ids.dtype == np.uint16 and len(ids) == block.tokens
                about = json.loads(sample["json"])
                assert len(ids) <= 600 or len(about["ids"]) == 1
                assert about["source"] == "jsonl" and "urls" not in about
                parts = np.split(ids, np.cumsum(about["tokens"])[:-1])
                for name, path, part in zip(about["ids"], about["paths"], parts, strict=True):
                    assert name not in seen and path == f"corpus.jsonl:{line_of[name]}"
                    assert part.tolist() == [*tokenizer.encode(texts[name]), tokenizer.eot_id]
                    seen[name] = split
                    in_shard.append((name, len(part)))
            assert in_shard == list(zip(index.document_ids, index.document_tokens, strict=True))
            assert (len(in_shard), sum(n for _, n in in_shard)) == (shard.documents, shard.tokens)
            assert shard.tokens >= 2500 or shard is source.shards[-1]
    assert set(seen) == set(texts)
    for name, split in seen.items():
        in_val = int(hashlib.sha256(texts[name].encode()).hexdigest()[:16], 16) / 16**16 < 0.1
        assert (split == "val") == in_val
    assert 15 < list(seen.values()).count("val") < 70
    report = json.loads((written / "report.json").read_text())
    assert report["dropped"] == {
        "empty": {"count": 1, "examples": ["corpus.jsonl:52"]},
        "not JSON": {"count": 1, "examples": ["corpus.jsonl:51"]},
    }
    assert report["kept"] == 400 == report["train"]["documents"] + report["val"]["documents"]


def test_any_number_of_workers_writes_the_same_bytes(
    home: Path, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read, "BLOCK", 3000)  # many tasks
    monkeypatch.setattr(encode, "TASK", 3000)
    shards.write(config(home, tmp_path / "one"))
    shards.write(config(home, tmp_path / "two", workers=2))
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    for split in ("train", "val"):  # nor does the size of a task matter to anything but the book-keeping
        assert tree(tmp_path / "one" / split) == tree(written / split)


def test_a_larger_val_fraction_keeps_the_smaller_one(home: Path) -> None:
    """A larger val_fraction takes what a smaller one took, and 0 takes nothing."""
    texts = list(texts_of(home).values())
    assert {encode.split_of(t, 0.0) for t in texts} == {"train"}
    small = {t for t in texts if encode.split_of(t, 0.1) == "val"}
    assert small < {t for t in texts if encode.split_of(t, 0.3) == "val"}


def test_a_stopped_write_ends_with_the_same_bytes(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rename in turn is the one that a kill forestalls; shards that were finished are not touched again."""
    sizes = {"shard_tokens": 6000, "val_fraction": 0.2}
    shards.write(config(home, tmp_path / "whole", **sizes))
    expected, stop_after = tree(tmp_path / "whole"), forestalled(monkeypatch, shards, files)
    for published in itertools.count():
        out = tmp_path / str(published)
        stop_after(published)
        try:
            shards.write(config(home, out, **sizes))
            break
        except KeyboardInterrupt:
            stop_after(-1)
        known = json.loads((out / "progress.json").read_text())["shards"] if published else {}
        finished = {
            p: p.stat().st_mtime_ns for s, found in known.items() for p in (out / s / f["info"]["name"] for f in found)
        }
        shards.write(config(home, out, **sizes))
        assert tree(out) == expected
        assert finished == {p: p.stat().st_mtime_ns for p in finished}
    assert published >= 3 * sum(name.endswith(".tar") for name in expected) + 6  # and manifests, report, progress


def test_shards_read_back_as_the_tokens_of_the_texts(home: Path, written: Path) -> None:
    """With the separator between them, by shard and by window."""
    tokenizer, texts = Tokenizer.load(home), texts_of(home)
    order: dict[str, list[int | None]] = {"train": [], "val": []}
    for text in texts.values():
        order[encode.split_of(text, 0.1)] += [*tokenizer.encode(text), tokenizer.eot_id]
    for split, expected in order.items():
        source = read_manifest(written / split)
        read_back = np.concatenate([read_shard(source, shard) for shard in source.shards])
        assert read_back.tolist() == expected
        tokens, labels = np.empty((1, 16), np.int64), np.empty((1, 16), np.int64)
        where = Windows(np.array([0]), np.array([0]), np.array([48]))
        ShardStream([source], open_shards=1).read(where, 16, tokens, labels)
        assert (tokens.tolist(), labels.tolist()) == ([expected[48:64]], [expected[49:65]])


@pytest.mark.slow
def test_a_killed_command_continues(home: Path, tmp_path: Path) -> None:
    """It continues where it was killed, and leaves no process."""
    texts = texts_of(home).values()
    (home / "long").mkdir()
    for part in range(4):
        lines = (json.dumps({"text": f"{t} {part} {i}"}) for i in range(50) for t in texts)
        (home / "long" / f"{part}.jsonl").write_text("\n".join(lines))
    sizes = ["val_fraction=0.05", "shard_tokens=50000", "block_tokens=10000", "workers=2"]
    where = ["corpus=jsonl", f"corpus.path={home / 'long'}", f"tokenizer={home}"]
    command = [sys.executable, "-m", "data_pipeline.shards", "write", *where, *sizes]
    killed = subprocess.Popen(
        [*command, f"output={tmp_path / 'out'}"], stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("out/train/0000[2-9].tar")):
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "train").glob("0000[01].tar")}
    assert not (tmp_path / "out" / "train" / "manifest.json").exists()
    while group_lives(killed.pid):
        assert time.monotonic() < deadline, "a worker outlived its killed parent"
        time.sleep(0.05)
    subprocess.run([*command, f"output={tmp_path / 'out'}"], check=True, stderr=subprocess.DEVNULL)
    subprocess.run([*command[:-1], "workers=1", f"output={tmp_path / 'whole'}"], check=True, stderr=subprocess.DEVNULL)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert before == {p: p.stat().st_mtime_ns for p in before}


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_second_write_finds_all_done_and_other_work_is_refused(
    home: Path,
    written: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = tree(written)
    shards.write(config(home, written))
    assert "already complete (train " in capsys.readouterr().out
    with pytest.raises(UserError, match=r"begun with val_fraction=0.1, now val_fraction=0.2: give another output="):
        shards.write(config(home, written, val_fraction=0.2))
    other = config(home, written)
    corpus, changed = home / "corpus.jsonl", home / "changed" / "corpus.jsonl"
    changed.parent.mkdir()
    changed.write_text(corpus.read_text() + "\n{}")
    corpus.rename(home / "aside")
    shutil.copy(changed, corpus)
    with pytest.raises(UserError, match=r"begun with corpus files .*give another output="):
        shards.write(other)
    (home / "aside").rename(corpus)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"taken: not empty, and not begun by this command"):
        shards.write(config(home, tmp_path / "taken"))
    shutil.copytree(written, tmp_path / "torn")
    lost = json.loads((written / "progress.json").read_text())
    lost["shards"].pop("val")
    for body in ("{}", json.dumps({"plan": 3, "shards": {"train": [], "val": []}, "done": False}), json.dumps(lost)):
        (tmp_path / "torn" / "progress.json").write_text(body)
        with pytest.raises(UserError, match=r"progress.json: damaged .*: delete the folder and write the shards again"):
            shards.write(config(home, tmp_path / "torn"))
    with monkeypatch.context() as other_version:
        other_version.setattr(encode, "TASK", encode.TASK + 1)
        with pytest.raises(UserError, match=r"begun with task, block, line, file bytes of this version=\[1048576, "):
            shards.write(config(home, written))
    with claimed(tmp_path / "busy"), pytest.raises(UserError, match="another write is at work there"):
        shards.write(config(home, tmp_path / "busy"))
    assert tree(written) == before


def test_splits_that_cannot_be_used_say_so(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards.write(config(home, tmp_path / "no_val", val_fraction=1e-9))
    assert "none of the 400 documents fell into validation" in capsys.readouterr().err
    assert not (tmp_path / "no_val" / "val").exists()
    with pytest.raises(UserError, match=r"val_fraction=0.999999999: all 400 documents fell into validation"):
        shards.write(config(home, tmp_path / "no_train", val_fraction=0.999999999))
    empty = config(home, tmp_path / "empty")
    (tmp_path / "empty.jsonl").write_text("{}\n")
    empty.corpus.path = str(tmp_path / "empty.jsonl")
    with pytest.raises(UserError, match=r"no document in corpus.path=.*empty.jsonl \(0 kept; dropped: 1 no text"):
        shards.write(empty)
    shards.write(config(home, tmp_path / "empty"))  # nothing was lost there, so another plan may begin


def test_a_killed_worker_and_a_full_disk_are_one_line(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished shards are kept."""

    def full(aside: Path, path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(shards, "rename", full)
    with pytest.raises(UserError, match=r"output=.*No space left on device .*run the same command again"):
        shards.write(config(home, tmp_path / "out"))
    monkeypatch.undo()
    monkeypatch.setattr(encode, "encode_task", die)
    with pytest.raises(UserError, match=r"a worker process was killed.*fewer than workers=2"):
        shards.write(config(home, tmp_path / "out", workers=2))


def die(task: encode.Task) -> None:
    os._exit(9)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, "uint16"), (65_537, "uint32")])
def test_ids_take_two_bytes_while_all_fit(
    tmp_path: Path, vocab_size: int, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a vocabulary without separator stores none."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("ab" * 10)
    body = json.loads(train_bpe(["abab"], 257).raw)
    body["added_tokens"][0] |= {"content": "<|big|>", "id": vocab_size - 1}
    del body["model"]["vocab"]["<|endoftext|>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(body))
    corpus = CorpusConfig(name="text", format=CorpusFormat.text, path=str(tmp_path / "in"))
    shards.write(ShardsConfig(corpus=corpus, tokenizer=str(tmp_path), output=str(tmp_path / "out"), val_fraction=0.0))
    err = capsys.readouterr().err
    assert "has no <|endoftext|>: documents are packed without a separator" in err
    assert "val_fraction=0.0: none of the 1 documents" in err and "which trainer.pretrain needs" in err
    source = read_manifest(tmp_path / "out" / "train")
    assert (source.dtype, source.vocab_size, source.eot_id) == (dtype, vocab_size, None)
    assert source.tokens == 20
    verify(VerifyConfig(str(tmp_path / "out")))


def rewrite(path: Path, change: Callable[[list[tuple[tarfile.TarInfo, bytes]]], None]) -> None:
    with tarfile.open(path) as tar:
        members = [(m, tar.extractfile(m).read()) for m in tar]  # type: ignore[union-attr]
    change(members)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: tokens_at(path)])


def hollow(path: Path) -> None:
    """A tar of one byte that says its first block is 400 MiB of zeros, in pax's words for a sparse file."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("000000.npy")
        info.pax_headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": str(400 << 20)}
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))


def mislead(path: Path) -> None:
    """A tar with a link where a sample's half was, and a member that would lie outside of where it is unpacked."""
    with tarfile.open(path) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    link, outside = tarfile.TarInfo(members[0][0].name), tarfile.TarInfo("../../outside")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(path, "w") as tar:
        tar.addfile(outside)
        tar.addfile(link)
        for member, data in members[1:]:
            tar.addfile(member, io.BytesIO(data))


def edit(path: Path, **change: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def lie(path: Path) -> None:
    index = read_index(path)
    write_index(
        path, type(index)(index.blocks, (*index.document_ids[:-1], "liar"), index.document_tokens, index.shard_sha256)
    )


def move(path: Path) -> None:
    """The first block's tokens 2 bytes further on than they are."""
    index = read_index(path)
    first = dataclasses.replace(index.blocks[0], offset=index.blocks[0].offset + 2)
    write_index(path, dataclasses.replace(index, blocks=(first, *index.blocks[1:])))


TAR = "train/00001.tar"
DEFECTS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "a flipped token": (lambda p: flip(p / TAR, tokens_at(p / TAR)), [TAR + ": sha256", TAR + ", 000000: crc32"]),
    "a flipped byte in a header": (lambda p: flip(p / TAR, 400), [TAR + ": sha256"]),
    "a member with a hole": (lambda p: hollow(p / TAR), [TAR + ", 000000.npy: claims 419430400 bytes in a shard of"]),
    "a link and a way outside": (
        lambda p: mislead(p / TAR),
        [TAR + ", ../../outside: not in the index", TAR + ", 000000.json: not in the index", "000000.json: missing"],
    ),
    "a source without its manifest": (lambda p: (p / "val/manifest.json").unlink(), ["val: shards, but no manifest"]),
    "a source that is gone": (lambda p: shutil.rmtree(p / "val"), ["report.json: val {'documents': "]),
    "a manifest of another vocabulary": (
        lambda p: edit(p / "val/manifest.json", vocab_size=401),
        ["val/tokenizer.json: 400 ids, end-of-text 399; the manifest says 401 and 399"],
    ),
    "a missing sample": (
        lambda p: rewrite(p / TAR, lambda m: m.__delitem__(slice(2, 4))),
        [TAR + ", 000001.npy: missing", TAR + ", 000001.json: missing"],
    ),
    "a sample twice": (lambda p: rewrite(p / TAR, lambda m: m.append(m[0])), [TAR + ", 000000.json: not in the index"]),
    "samples swapped": (
        lambda p: rewrite(p / TAR, lambda m: m.__setitem__(slice(0, 4), m[2:4] + m[0:2])),
        [TAR + ": sha256", "they differ from number 0 on"],
    ),
    "a truncated tar": (lambda p: truncate(p / TAR), [TAR + ": not a whole tar", "bytes, the manifest says"]),
    "a missing shard": (lambda p: (p / TAR).unlink(), [TAR + ": No such file"]),
    "an extra shard": (lambda p: (p / "train/00099.tar").write_bytes(b""), ["train/00099.tar: not in the manifest"]),
    "a missing index": (lambda p: (p / "train/00001.idx.json").unlink(), ["00001.idx.json: no such file"]),
    "an index that disagrees": (lambda p: lie(p / "train/00001.idx.json"), ["documents, the index says"]),
    "an index that points elsewhere": (
        lambda p: move(p / "train/00001.idx.json"),
        [TAR + ", 000000: tokens from byte ", "the index says"],
    ),
    "an index of another shard": (
        lambda p: edit(p / "train/00001.idx.json", shard_sha256="ab"),
        ["00001.idx.json: of shard ab, the manifest says"],
    ),
    "another tokenizer": (lambda p: flip(p / "val/tokenizer.json", 30), ["val/tokenizer.json: sha256"]),
    "a shard under another's name": (
        lambda p: shutil.copy(p / "train/00000.tar", p / TAR),
        [TAR + ": sha256", TAR + ", 000000: crc32"],
    ),
}


def tokens_at(path: Path) -> int:
    with tarfile.open(path) as tar:
        return tar.getmember("000000.npy").offset_data + 200


@pytest.mark.parametrize("defect", DEFECTS)
def test_verify_finds(defect: str, written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, expected = DEFECTS[defect]
    shutil.copytree(written, tmp_path / "out")
    verify(VerifyConfig(str(tmp_path / "out")))
    assert f"{tmp_path / 'out'}: ok, 2 sources, " in capsys.readouterr().out
    damage(tmp_path / "out")
    with pytest.raises(UserError, match=r"\d+ defects in [12] sources, listed above"):
        verify(VerifyConfig(str(tmp_path / "out")))
    out = capsys.readouterr().out
    for line in expected:
        assert line in out


def test_verify_needs_a_source(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no manifest.json there or one folder below"):
        verify(VerifyConfig(str(tmp_path)))
