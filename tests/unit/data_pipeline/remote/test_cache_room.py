"""A cache that cannot hold what a node's ranks use at once is refused before training, with every operand."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from conf.errors import UserError
from conf.schema import load
from data_pipeline.config import FetchConfig
from data_pipeline.manifest import Manifest, ShardInfo
from data_pipeline.remote.cache import Cache
from tests.helpers.seeds import seeded
from trainer.config.pretrain import PretrainConfig
from trainer.data.sources import Sources, check_cache
from trainer.distributed.world import World

LANES = 8


def manifest(sizes: list[int], origin: str | None = "s3://bucket/a") -> Manifest:
    shards = tuple(ShardInfo(f"{n:05d}.tar", size, "0" * 64, 1, size // 2) for n, size in enumerate(sizes))
    return Manifest(Path(), "test", "train", "uint16", 1024, None, "", shards, origin)


def check(root: Path, train: dict[str, Manifest], world: World, limit: int, tp: int = 1) -> None:
    given = {"data.cache.dir": f"{root}/cache", "data.cache.limit_gib": limit / 2**30, "data.lanes": LANES}
    overrides = ["experiment=demo", "data.path=none", f"run.dir={root}", *(f"{k}={v}" for k, v in given.items())]
    cfg: PretrainConfig = load(PretrainConfig, overrides)
    check_cache(cfg.data, Sources(train, {}, Cache(cfg.data.cache, FetchConfig())), world, tp)


# world size, ranks of a node (None: not said), tp -> lanes that are read on a node
NODES = [
    (World(0, 1, 0), 1, 8),
    (World(0, 4, 0), 1, 8),
    (World(0, 8, 0, 2), 1, 2),
    (World(3, 4, 1, 2), 1, 4),
    (World(0, 8, 0, 4), 2, 4),
    (World(0, 4, 0, 1), 2, 4),  # a group over two nodes: on one of them a rank reads
]


@pytest.mark.parametrize(("world", "tp", "lanes"), NODES)
def test_two_shards_of_each_source_for_each_lane_must_fit(tmp_path: Path, world: World, tp: int, lanes: int) -> None:
    """The cache must have room for two shards of each source for each lane of the node."""
    seed = seeded()
    rng = random.Random(seed)
    sizes = {name: [rng.randrange(1000, 9000) for _ in range(n)] for name, n in (("web", 40), ("books", 3))}
    need = sum(sum(sorted(some)[-2 * lanes :]) for some in sizes.values())  # a source of few shards: all of them
    train = {name: manifest(some) for name, some in sizes.items()} | {"local": manifest([10**12], origin=None)}
    check(tmp_path, train, world, need, tp)
    with pytest.raises(UserError) as error:
        check(tmp_path, train, world, need - 1, tp)
    message = str(error.value)
    for operand in (f"= {need:,} bytes", f"{need - 1:,} bytes", "data.lanes=8", "shards of web", "3 shards of books"):
        assert operand in message, f"seed {seed}: {message}"
    assert ("LOCAL_WORLD_SIZE is not set" in message) == (world.local_world_size is None)
    [cure] = re.findall(r"give data\.cache\.limit_gib=([0-9.]+)", message)
    check(tmp_path, train, world, int(float(cure) * 2**30), tp)  # what it says helps


def test_sources_in_local_folders_need_no_cache(tmp_path: Path) -> None:
    check(tmp_path, {"local": manifest([10**12], origin=None)}, World(0, 1, 0), 1)
