"""Shards: nothing lost, the same bytes whatever happens on the way, and no damage that verify does not find."""

from __future__ import annotations

import hashlib
import io
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

from data_pipeline import shards
from data_pipeline.bpe import Tokenizer, train_bpe
from data_pipeline.config import CorpusConfig, CorpusFormat, ShardsConfig, UserError, VerifyConfig
from data_pipeline.manifest import index_path, read_index, read_manifest, write_index
from data_pipeline.prepare import encode, progress, read

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


def test_every_document_is_there_once_with_its_tokens_and_where_it_came_from(home: Path, written: Path) -> None:
    tokenizer, texts, seen = Tokenizer.load(home), texts_of(home), {}
    for split in ("train", "val"):
        manifest = read_manifest(written / split)
        assert Tokenizer.load(manifest.root).sha256 == manifest.tokenizer_sha256
        for shard in manifest.shards:
            index = read_index(index_path(manifest, shard))
            in_shard = []
            samples = wds.WebDataset(str(manifest.root / shard.name), shardshuffle=False)
            for sample, block in zip(samples, index.blocks, strict=True):
                ids = np.load(io.BytesIO(sample["npy"]), allow_pickle=False)
                assert ids.dtype == np.uint16 and len(ids) == block.tokens
                documents = json.loads(sample["json"])["documents"]
                assert len(ids) <= 600 or len(documents) == 1
                parts = np.split(ids, np.cumsum([d["tokens"] for d in documents])[:-1])
                for d, part in zip(documents, parts, strict=True):
                    assert d["id"] not in seen and d["source"] == "jsonl" and d["path"].startswith("corpus.jsonl:")
                    assert part.tolist() == [*tokenizer.encode(texts[d["id"]]), tokenizer.eot_id]
                    seen[d["id"]] = split
                    in_shard.append((d["id"], d["tokens"]))
            assert in_shard == list(zip(index.document_ids, index.document_tokens, strict=True))
            assert (len(in_shard), sum(n for _, n in in_shard)) == (shard.documents, shard.tokens)
            assert shard.tokens >= 2500 or shard is manifest.shards[-1]
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


def test_the_split_does_not_depend_on_order_or_company(home: Path) -> None:
    texts = list(texts_of(home).values())
    assert {t: encode.split_of(t, 0.1) for t in texts} == {t: encode.split_of(t, 0.1) for t in reversed(texts)}
    assert {encode.split_of(t, 0.0) for t in texts} == {"train"}
    small = {t for t in texts if encode.split_of(t, 0.1) == "val"}
    assert small < {t for t in texts if encode.split_of(t, 0.3) == "val"}


def test_a_write_that_stops_anywhere_goes_on_and_ends_with_the_same_bytes(
    home: Path, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stops before each publication in turn, as a kill would; finished shards are not touched again."""
    rename, expected = shards.rename, tree(written)
    calls = 0

    def stop(aside: Path, path: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        rename(aside, path)

    monkeypatch.setattr(shards, "rename", stop)
    stops, finished = 0, {}
    while True:
        calls = 0
        try:
            shards.write(config(home, tmp_path / "out"))
            break
        except KeyboardInterrupt:
            stops += 1
        now = {p: p.stat().st_mtime_ns for p in sorted((tmp_path / "out").rglob("*.tar"))}
        assert finished.items() <= now.items()
        finished = now
    assert stops >= 3
    assert tree(tmp_path / "out") == expected


@pytest.mark.slow
def test_a_killed_command_goes_on_where_it_was_and_leaves_no_process(home: Path, tmp_path: Path) -> None:
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
    home: Path, written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
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
    with progress.claimed(tmp_path / "busy"), pytest.raises(UserError, match="another write is at work there"):
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


def test_a_killed_worker_and_a_full_disk_are_one_line_and_keep_what_is_finished(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(aside: Path, path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(shards, "rename", full)
    with pytest.raises(UserError, match=r"output=.*No space left on device .*run the same command again"):
        shards.write(config(home, tmp_path / "out"))
    monkeypatch.undo()
    monkeypatch.setattr(encode, "_run", die)
    with pytest.raises(UserError, match=r"a worker process was killed.*fewer than workers=2"):
        shards.write(config(home, tmp_path / "out", workers=2))


def die(task: encode.Task) -> None:
    os._exit(9)


def test_a_large_vocabulary_takes_four_bytes_and_one_without_separator_stores_none(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("ab" * 10)
    body = json.loads(train_bpe(["abab"], 257).raw)
    body["added_tokens"][0] |= {"content": "<|big|>", "id": 70_000}
    del body["model"]["vocab"]["<|endoftext|>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(body))
    corpus = CorpusConfig(name="text", format=CorpusFormat.text, path=str(tmp_path / "in"))
    shards.write(ShardsConfig(corpus=corpus, tokenizer=str(tmp_path), output=str(tmp_path / "out"), val_fraction=0.0))
    manifest = read_manifest(tmp_path / "out" / "train")
    assert (manifest.dtype, manifest.vocab_size, manifest.eot_id) == ("uint32", 70_001, None)
    assert manifest.tokens == 20
    shards.verify(VerifyConfig(str(tmp_path / "out")))


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


def lie(path: Path) -> None:
    index = read_index(path)
    write_index(path, type(index)(index.blocks, (*index.document_ids[:-1], "liar"), index.document_tokens))


TAR = "train/00001.tar"
DEFECTS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "a flipped token": (lambda p: flip(p / TAR, tokens_at(p / TAR)), [TAR + ": sha256", TAR + ", 000000: crc32"]),
    "a flipped byte between samples": (lambda p: flip(p / TAR, 400), [TAR + ": sha256"]),
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
    shards.verify(VerifyConfig(str(tmp_path / "out")))
    assert f"{tmp_path / 'out'}: ok, 2 sources, " in capsys.readouterr().out
    damage(tmp_path / "out")
    with pytest.raises(UserError, match=r"\d+ defects in 2 sources, listed above"):
        shards.verify(VerifyConfig(str(tmp_path / "out")))
    out = capsys.readouterr().out
    for line in expected:
        assert line in out


def test_verify_needs_a_source(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no manifest.json there or one folder below"):
        shards.verify(VerifyConfig(str(tmp_path)))
