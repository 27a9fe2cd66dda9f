"""Shards as the last stage of a recipe: the bytes of `shards write`, and settings that cannot change silently."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("datatrove", reason="the corpus extra is not installed")

from conf.errors import UserError
from conf.schema import load
from data_pipeline.corpus.corpus_config import CorpusConfig, CorpusFormat
from data_pipeline.prepare.prepare_config import PrepareConfig
from data_pipeline.prepare.run import prepare
from data_pipeline.shards.shards_config import ShardsConfig
from data_pipeline.shards.write import write
from data_pipeline.tokenizer.tokenizer import train_bpe
from tests.unit.data_pipeline.shards.test_shards import tree

SIZES = {"val_fraction": 0.2, "shard_tokens": 400, "block_tokens": 100}


def recipe(folder: Path, *more: str, **sizes: float) -> PrepareConfig:
    """Over 60 lines of JSON, and one that is damaged."""
    if not (folder / "in.jsonl").exists():
        texts = [f"{i} " * (5 + i % 7) for i in range(60)]
        train_bpe(texts, 300).save(folder)
        (folder / "in.jsonl").write_text("\n".join([*(json.dumps({"text": text}) for text in texts), "{damaged"]))
    given = [f"shards.{key}={value}" for key, value in (SIZES | sizes).items()]
    paths = [f"input={folder / 'in.jsonl'}", f"output={folder / 'out'}", f"tokenizer={folder}"]
    return load(PrepareConfig, ["corpus=jsonl", *paths, "executor.workers=1", *given, *more])


def test_shards_of_a_recipe_are_those_of_shards_write(tmp_path: Path) -> None:
    """One command and two give the same bytes of every file, and documents without shards get them later."""
    prepare(recipe(tmp_path))
    assert not (tmp_path / "out" / "shards").exists()
    prepare(recipe(tmp_path, "shards.write=true"))
    corpus = CorpusConfig("jsonl", CorpusFormat.jsonl, str(tmp_path / "out" / "documents"))
    write(ShardsConfig(corpus=corpus, tokenizer=str(tmp_path), output=str(tmp_path / "apart"), **SIZES))  # type: ignore[arg-type]
    expected = tree(tmp_path / "apart")
    assert tree(tmp_path / "out" / "shards") == expected and "train/00001.tar" in expected
    prepare(recipe(tmp_path, "shards.write=true"))
    assert tree(tmp_path / "out" / "shards") == expected


def test_other_settings_for_finished_shards_are_refused(tmp_path: Path) -> None:
    """The stage looks at its settings though it is complete."""
    prepare(recipe(tmp_path, "shards.write=true"))
    with pytest.raises(UserError, match=r"out/shards was begun with block_tokens=100, now block_tokens=50"):
        prepare(recipe(tmp_path, "shards.write=true", block_tokens=50))


def test_shards_without_a_tokenizer_are_refused(tmp_path: Path) -> None:
    """Before any work."""
    with pytest.raises(UserError, match=r"shards\.write=true, but tokenizer=null"):
        recipe(tmp_path, "shards.write=true", "tokenizer=null")
