"""What a recipe needs is looked at before any work, and a mistake leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from conf.errors import UserError
from conf.schema import load
from data_pipeline.prepare.preconditions import check
from data_pipeline.prepare.prepare_config import PrepareConfig
from data_pipeline.prepare.run import prepare
from tests.helpers.crawls import drops, kept_ids, report

PLAIN = ("corpus=jsonl", "tokenizer=null", "executor.workers=1")


def lines(path: Path, texts: dict[str, str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in texts.items()))
    return path


def made(out: Path, *words: str) -> Path:
    prepare(load(PrepareConfig, [*PLAIN, f"output={out}", *words]))
    return out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["corpus.recipe.quality.model=gone.safetensors"], "gone.safetensors: No such file or directory: give a model"),
        (["corpus.recipe.decontaminate.sets=[gone.jsonl]"], "decontaminate.sets=gone.jsonl: no such file or folder"),
        (["corpus.recipe.dedup.against=[gone]"], "corpus.recipe.dedup.against: no gone/work/duplicates/clusters.json"),
        (["corpus.recipe.dedup.against=[a/x,b/x/]"], "recipe.dedup.against: a/x and b/x/ have the same name"),
        (
            ["executor=ray", "corpus.recipe.dedup.memory_gib=3.5"],
            "dedup.memory_gib=3.5 and 1 GiB beside it are more than executor.memory_gib=4",
        ),
        (["output=s3://bucket/out"], "output=s3://bucket/out: give a path on this machine"),
        (["corpus.recipe.fetch.agent=a"], "corpus=jsonl: recipe.fetch=given with format=jsonl"),
        (
            ["corpus.quality={positives: [a], negatives: [b], output: c.safetensors}"],
            "corpus=jsonl: corpus.quality=given with format=jsonl",
        ),
        (
            ["corpus.sources={a: {name: a, format: text, path: b}}"],
            "corpus=jsonl: corpus.sources=given with format=jsonl",
        ),
        (["corpus.recipe.length.min_tokens=9"], "corpus.recipe.length.min_tokens=9, but tokenizer=null counts none"),
        (["tokenizer=gone"], "tokenizer=gone: no vocabulary there"),
        (["corpus.recipe.links.min_score=1"], "corpus=jsonl: recipe.links=given with format=jsonl"),
        (["corpus=webtext", "corpus.recipe.links=null"], "corpus=webtext: recipe.links=null with format=links"),
        (
            ["corpus=webtext", "tokenizer=gpt2", "corpus.recipe.links.until=2017"],
            "links.until=2017: give a day as",
        ),
        (["corpus=common_crawl", "corpus.recipe.extractor=null"], "recipe.extractor=null, but its pages are HTML"),
        (["corpus=gpt3_mix"], "corpus=webtext2 reads links: say where, corpus.sources.webtext2.path=FILE_OR_FOLDER"),
    ],
)
def test_what_is_missing_is_said_in_a_line_and_nothing_is_begun(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = lines(tmp_path / "in" / "a.jsonl", {"a": "a text"})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        made(tmp_path / "out", f"input={source}", *words)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_output_within_its_input_is_refused(tmp_path: Path) -> None:
    """So is an output in the place of a file."""
    source = lines(tmp_path / "in" / "a.jsonl", {"a": "a text"})
    with pytest.raises(UserError, match=rf"output={source.parent}/out lies in input={source.parent}, which is all"):
        made(source.parent / "out", f"input={source.parent}")
    with pytest.raises(UserError, match=rf"output={source}: no folder, but a file is there"):
        made(source, f"input={source}")


@pytest.mark.parametrize(
    ("where", "out", "refused"),
    [
        ("in/**/*.jsonl", "in/out", True),
        ("in/*/**/*.jsonl", "in/x/out", True),
        ("in/*/*.json", "in/out", True),
        ("in/x*/*.json", "in/out", False),
        ("in/*.jsonl", "in/out", False),
        ("in/*", "in/out", False),
        ("in/**/*.jsonl", "out", False),
        ("in/**/*.jsonl", "in/../out", False),
    ],
)
def test_a_glob_that_takes_in_the_output_is_refused(where: str, out: str, refused: bool, tmp_path: Path) -> None:
    lines(tmp_path / "in" / "x" / "a.jsonl", {"a": "a text"})
    cfg = load(PrepareConfig, [*PLAIN, f"input={tmp_path / where}", f"output={tmp_path}/{out}"])
    if refused:
        with pytest.raises(UserError, match=r"output=.*out lies in input=.*, which may match its files"):
            check(cfg)
    else:
        check(cfg)


def several(*sources: str) -> list[str]:
    each = [
        f"corpus.sources.{s}={{name: {s}, format: jsonl, path: a, recipe: {{dedup: {{text: words}}}}}}" for s in sources
    ]
    return ["corpus=jsonl", "corpus.format=several", "input=null", "tokenizer=null", "output=out", *each]


def test_a_source_is_compared_with_earlier_ones_only() -> None:
    """A source may be compared only with sources that are made before it."""
    check(load(PrepareConfig, [*several("a", "b"), "corpus.sources.b.recipe.dedup.against=[out/a]"]))
    for other in ("a", "b"):
        with pytest.raises(UserError, match=rf"sources.a.recipe.dedup.against: no out/{other}/work/duplicates"):
            check(load(PrepareConfig, [*several("a", "b"), f"corpus.sources.a.recipe.dedup.against=[out/{other}]"]))


def test_several_corpora_have_recipes_of_their_own_alone() -> None:
    with pytest.raises(UserError, match=r"is several corpora, and corpus.recipe is given"):
        load(PrepareConfig, [*several("a"), "corpus.recipe.pii.phone=true"])


def test_a_corpus_may_lose_all_its_documents(tmp_path: Path) -> None:
    """A corpus without a document left is an error with a report, and others compare with it."""
    source, dedup = lines(tmp_path / "a.jsonl", {"a": "a text", "b": "other words"}), "corpus.recipe.dedup.text=words"
    empty = tmp_path / "empty"
    with pytest.raises(UserError, match="no document is left of 2 records"):
        made(empty, f"input={source}", dedup, "corpus.recipe.length.min_chars=100")
    assert (kept_ids(empty), drops(empty)) == ([], {"too few characters": 2})
    assert report(empty)["duplicates"]["documents"] == 0
    first = made(tmp_path / "first", f"input={lines(tmp_path / 'b.jsonl', {'x': 'A text!'})}", dedup)
    against = f"corpus.recipe.dedup.against=[{empty},{first}]"
    assert kept_ids(made(tmp_path / "out", f"input={source}", dedup, against)) == ["b"]
    assert drops(tmp_path / "out") == {"the same text as in first": 1}
    (first / "work" / "duplicates" / "clusters.json").unlink()
    with pytest.raises(UserError, match="each is complete"):
        made(tmp_path / "another", f"input={source}", dedup, against)


def test_an_output_is_held_to_the_files_that_its_steps_read(tmp_path: Path) -> None:
    source, words = lines(tmp_path / "a.jsonl", {"a": "a text", "b": "a cat"}), tmp_path / "words.txt"
    words.write_text("cat\n")
    given = (f"input={source}", f"corpus.recipe.bad_words.file={words}")
    out = made(tmp_path / "out", *given)
    assert kept_ids(out) == ["a"]
    made(out, *given)
    words.write_text("dog\n")
    os.utime(words, ns=(1, 1))
    with pytest.raises(UserError, match=rf"was begun with files of corpus.recipe.bad_words.file={words} .*now"):
        made(out, *given)
    shutil.rmtree(out)
    assert kept_ids(made(out, *given)) == ["a", "b"]
    lines(source, {"a": "changed"})
    with pytest.raises(UserError, match=rf"was begun with files of input={source} "):
        made(out, *given)
