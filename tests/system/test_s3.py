"""Sources and inputs at s3://, read by s3fs from a real server: the same bytes, the same words for what is wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from conf.errors import UserError
from conf.schema import load
from data_pipeline.config import CacheConfig, FetchConfig
from data_pipeline.manifest import Manifest
from data_pipeline.prepare.prepare_config import PrepareConfig
from data_pipeline.prepare.run import prepare
from data_pipeline.remote.cache import Cache
from data_pipeline.remote.source import LostShard, open_source
from data_pipeline.shards.shards_config import ShardsConfig, VerifyConfig
from data_pipeline.shards.verify import verify
from data_pipeline.shards.write import write
from data_pipeline.stream.windows import ShardStream
from data_pipeline.tokenizer.tokenizer import train_bpe
from tests.helpers.fixtures import random_source
from tests.helpers.s3_server import Bucket, bucket
from tests.helpers.seeds import seeded
from tests.system.mixtures import check_fed, in_turn, make_mixture, mixture, state
from tests.unit.data_pipeline.stream.test_stream import N_CTX, read, some_windows
from trainer.run.journal import read_journal

pytestmark = pytest.mark.slow
QUICK = FetchConfig(timeout_s=5.0, retries=0)


@pytest.fixture(scope="module")
def there() -> Iterator[Bucket]:
    with bucket() as made:
        yield made


@pytest.fixture
def local(tmp_path: Path) -> Manifest:
    return random_source(tmp_path / tmp_path.name / "train", [4000, 3000, 5000], seed=seeded())


def stream_of(url: str, tmp_path: Path) -> ShardStream:
    cache = Cache(CacheConfig(dir=str(tmp_path / "cache")), QUICK)
    return ShardStream([open_source(url, cache)], open_shards=1, cache=cache)


def test_a_run_is_fed_from_s3_validated_and_saved(there: Bucket, tmp_path: Path) -> None:
    root = make_mixture(tmp_path / "data", {"web": [4] * 9})
    afar = (f"data.path={there.put(root)}", f"data.cache.dir={tmp_path / 'cache'}", "data.fetch.retries=1")
    often = ("max_steps=4", "eval.every=2", "checkpoint.every_steps=4")
    [[said]] = in_turn([(tmp_path / "run", (*mixture(root, {"web": 1}), *afar, *often))])
    assert "error: " not in said, said
    check_fed(root, tmp_path / "run", ["web"], {range(4): 1})
    assert state(tmp_path / "run")["step"] == 4
    assert sum("val/loss" in row.metrics for row in read_journal(tmp_path / "run" / "metrics.jsonl")) == 2


def test_a_shard_cut_short_or_missing_in_s3_is_lost(there: Bucket, local: Manifest, tmp_path: Path) -> None:
    url = there.put(local.root.parent)
    stream, name = stream_of(f"{url}/train", tmp_path), f"{url}/train/00001.tar"
    there.files.pipe_file(name, there.files.cat_file(name)[:300])
    with pytest.raises(LostShard, match=r"00001.tar: .*truncated"):
        read(stream, some_windows([local], 40, N_CTX, seeded()))
    there.files.rm(name)
    with pytest.raises(LostShard, match=r"00001.tar: no such file"):
        read(stream, some_windows([local], 40, N_CTX, seeded()))


def test_texts_in_s3_become_shards_that_verify_reads_there(
    there: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [f"text {i} of the sea and of the ships that cross it in {i} days" for i in range(40)]
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a b é.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    train_bpe(texts, 300).save(tmp_path)
    raw, made = there.put(tmp_path / "raw"), tmp_path / "made"
    plain = ["corpus=jsonl", f"tokenizer={tmp_path}", "val_fraction=0.2", "shard_tokens=200", "block_tokens=100"]
    write(load(ShardsConfig, [*plain, f"corpus.path={raw}", f"output={made}"]))
    write(load(ShardsConfig, [*plain, f"corpus.path={tmp_path / 'raw'}", f"output={tmp_path / 'here'}"]))
    shards = sorted(path.relative_to(made) for path in made.glob("*/*.tar"))
    assert len(shards) > 3
    assert all((made / shard).read_bytes() == (tmp_path / "here" / shard).read_bytes() for shard in shards)
    prepare(load(PrepareConfig, ["corpus=jsonl", f"input={raw}/*.jsonl", "tokenizer=null", f"output={tmp_path / 'p'}"]))
    assert list((tmp_path / "p" / "documents").iterdir())
    with pytest.raises(UserError, match=f"output={raw}/out: give a path on this machine"):
        load(ShardsConfig, [*plain, "corpus.path=x", f"output={raw}/out"])

    capsys.readouterr()
    url = there.put(made)
    for place in (made, url):
        verify(VerifyConfig(str(place)))
    here, afar = capsys.readouterr().out.splitlines()
    assert afar == here.replace(str(made), url) and "ok, 2 sources" in afar
    for name, body in {"00000.tar": bytes(1000), "00001.idx.json": None, "00099.tar": b""}.items():
        if body is None:
            there.files.rm(f"{url}/train/{name}")
        else:
            there.files.pipe_file(f"{url}/train/{name}", body)
    with pytest.raises(UserError, match=rf"path={url}: \d+ defects in 2 sources"):
        verify(VerifyConfig(url))
    said = capsys.readouterr().out
    for line in (r"00099.tar: not in the manifest", r"00000.tar: sha256 \w+", r"00001.idx.json: no such file"):
        assert re.search(rf"^{url}/train/{line}", said, re.MULTILINE), said
    with pytest.raises(UserError, match=f"path={url}/none: no manifest.json there"):
        verify(VerifyConfig(f"{url}/none"))
