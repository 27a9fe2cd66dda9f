"""The sides of tests.benchmarks.corpus: this project's steps and datatrove's own, over the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import BaseFilter

from conf.schema import load
from data_pipeline.corpus.document import Dropped
from data_pipeline.corpus.inputs import files_at
from data_pipeline.corpus.read import documents
from data_pipeline.corpus.report import Report
from data_pipeline.prepare.dedup.clusters import find
from data_pipeline.prepare.dedup.keys import write_keys
from data_pipeline.prepare.dedup.minhash import MinHash
from data_pipeline.prepare.extract.extract import Extract
from data_pipeline.prepare.prepare_config import PrepareConfig
from data_pipeline.prepare.recipe_config import DedupConfig, Extractor, RecipeConfig
from data_pipeline.prepare.recipes import filters
from data_pipeline.prepare.warc.archive import read
from data_pipeline.shards.shards_config import BpeTrainConfig
from data_pipeline.tokenizer.tokenizer import Tokenizer
from data_pipeline.tokenizer.vocabularies import find_gpt2_file

Run = Callable[[], tuple[int, int]]
"""Does the work; bytes that went in, documents that came out."""


@dataclass(frozen=True)
class Side:
    of: str  # "html" or "text": what its MB are of
    prepare: Callable[[str], Run]  # from the archives' folder or the file of texts


@cache
def recipe(extractor: str = "fast") -> RecipeConfig:
    """conf/corpus/common_crawl.yaml, without what is done after the rules."""
    cfg = load(PrepareConfig, ["input=x", "output=x", f"corpus.recipe.extractor={extractor}"]).corpus.recipe
    cfg.dedup = cfg.pii = None
    return cfg


def texts_of(path: str) -> list[Document]:
    return [Document(d["text"], d["id"]) for d in map(json.loads, Path(path).read_text().splitlines())]


def size(docs: list[Document]) -> int:
    return sum(len(doc.text.encode()) for doc in docs)


def pages(folder: str) -> Iterator[Document]:
    for file in files_at(folder):
        yield from (item for item, _ in read(file, recipe().limits, "bench") if not isinstance(item, Dropped))


def html_bytes(folder: str) -> int:
    return sum(len(doc.metadata.get("html", doc.text)) for doc in pages(folder))


def through(steps: list[Any], documents: Iterator[Document]) -> int:
    stream: Any = documents
    for step in steps:
        stream = step.run(stream)
    return sum(1 for _ in stream)


def end(steps: list[Any]) -> None:
    """Sandboxes end, so that their processes count."""
    for step in steps:
        if isinstance(step, Extract):
            step.sandbox.close()


def ours_from_archives(folder: str, extractor: str) -> Run:
    total, steps = html_bytes(folder), filters(recipe(extractor), Path())
    page = b"<html><body><article><p>A page to begin with, of some words.</p></article></body></html>"
    through(steps[1:2], iter([Document("", "warm", metadata={"html": page})]))
    through(steps[2:], prose())

    def run() -> tuple[int, int]:
        kept = through(steps, pages(folder))
        end(steps)
        return total, kept

    return run


def prose() -> Iterator[Document]:
    """What Python carries, to fill tables with."""
    found = documents(load(BpeTrainConfig, ["corpus=pydocs", "output=x"]).corpus, Report())
    yield from (Document(doc.text, doc.id) for doc in islice(found, 150))


class Language(BaseFilter):
    """datatrove's LanguageFilter on the small model: its own file has to be downloaded."""

    name = "language"

    def __init__(self) -> None:
        super().__init__()
        from fasttext import load_model

        from data_pipeline.prepare.rules.language import model_path

        self.model = load_model(str(model_path()))

    def filter(self, doc: Document) -> bool:
        labels, scores = self.model.predict(doc.text.replace("\n", " "), k=-1)
        pairs = dict(zip(labels, scores, strict=True))
        doc.metadata["language"] = max(pairs, key=lambda label: pairs[label])
        return bool(pairs.get("__label__en", 0.0) > 0.65)


def datatrove_steps() -> list[PipelineStep]:
    from datatrove.pipeline import filters as theirs
    from datatrove.pipeline.extractors import Trafilatura

    return [
        Trafilatura(favour_precision=True, timeout=10),
        Language(),
        theirs.GopherRepetitionFilter(),
        theirs.GopherQualityFilter(),
        theirs.C4QualityFilter(filter_no_terminal_punct=False),
        theirs.FineWebQualityFilter(),
    ]


def datatrove_from_archives(folder: str) -> Run:
    from datatrove.pipeline.readers import WarcReader

    total, steps = html_bytes(folder), datatrove_steps()
    through(steps[1:], prose())

    def run() -> tuple[int, int]:
        return total, through(steps, WarcReader(folder, compression="infer").run())

    return run


def ours_step(path: str, name: str) -> Run:
    step = next(step for step in filters(recipe(), Path()) if step.name == name)
    return alone(step, path)


def datatrove_step(path: str, index: int) -> Run:
    return alone(datatrove_steps()[index], path)


def alone(step: Any, path: str) -> Run:
    """The step over all texts; its tables and models begin with the first hundred of them, again and otherwise cut."""
    docs = texts_of(path)
    through([step], iter([Document(doc.text[1000:3000], doc.id) for doc in docs[:100]]))
    return lambda: (size(docs), through([step], iter(docs)))


def minhash_config() -> Any:
    dedup = load(PrepareConfig, ["input=x", "output=x"]).corpus.recipe.dedup
    assert dedup is not None and dedup.minhash is not None
    return replace(dedup.minhash, min_jaccard=None)  # datatrove has no second look


def ours_signatures(path: str) -> Run:
    docs, minhash = texts_of(path), MinHash(minhash_config())
    minhash.bands_of(["a few words to begin with here"])
    return lambda: (size(docs), len(minhash.bands_of([doc.text for doc in docs])))


def datatrove_signatures(path: str) -> Run:
    docs = texts_of(path)
    folder = tempfile.mkdtemp()
    step = datatrove_minhash(folder)[0]
    step.run(iter(docs[:1]), 1, 2)

    def run() -> tuple[int, int]:
        step.run(iter(docs), 0, 2)
        return size(docs), len(docs)

    return run


def datatrove_minhash(folder: str) -> list[Any]:
    """FineWeb's settings; sha1, since xxhash 4 takes no text from datatrove 0.10."""
    from datatrove.pipeline.dedup import MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets, MinhashDedupCluster
    from datatrove.utils.hashing import HashConfig

    cfg = MinhashConfig(
        hash_config=HashConfig(hash_fc="sha1", precision=64), num_buckets=14, hashes_per_bucket=8, n_grams=5
    )
    return [
        MinhashDedupSignature(f"{folder}/sig", config=cfg),
        MinhashDedupBuckets(f"{folder}/sig", f"{folder}/buckets", config=cfg),
        MinhashDedupCluster(f"{folder}/buckets", f"{folder}/remove", config=cfg, save_cluster_size=False),
    ]


def ours_minhash(path: str) -> Run:
    docs, cfg = texts_of(path), DedupConfig(minhash=minhash_config())
    folder = Path(tempfile.mkdtemp())
    write_keys(folder / "warm" / "0.safetensors", docs[:1], cfg)

    def run() -> tuple[int, int]:
        write_keys(folder / "keys" / "00000-00000.safetensors", docs, cfg)
        (folder / "out").mkdir()
        return size(docs), find(folder / "keys", [], cfg, folder / "out").stay

    return run


def datatrove_whole_minhash(path: str) -> Run:
    docs, folder = texts_of(path), tempfile.mkdtemp()
    signatures, buckets, clusters = datatrove_minhash(folder)

    def run() -> tuple[int, int]:
        signatures.run(iter(docs), 0, 1)
        for rank in range(14):
            buckets.run(None, rank, 14)
        clusters.run(None, 0, 1)
        removed = sum(path.stat().st_size // 4 for path in Path(folder, "remove").iterdir())
        return size(docs), len(docs) - removed

    return run


def ours_tokens(path: str) -> Run:
    docs, tokenizer = texts_of(path), Tokenizer.load("gpt2")
    tokenizer.encode_batch(["warm"])
    texts = [doc.text for doc in docs]
    return lambda: (size(docs), digest(tokenizer.encode_batch(texts)))


def tiktoken_tokens(path: str) -> Run:
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import r50k_pat_str

    folder = Path(tempfile.mkdtemp())
    files = [folder / "vocab.bpe", folder / "encoder.json"]
    for file in files:
        file.write_bytes(find_gpt2_file(file.name))
    ranks = data_gym_to_mergeable_bpe_ranks(str(files[0]), str(files[1]))
    coder = tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={})
    texts = [doc.text for doc in texts_of(path)]
    coder.encode_ordinary("warm")
    return lambda: (sum(len(t.encode()) for t in texts), digest([coder.encode_ordinary(text) for text in texts]))


def digest(ids: Any) -> int:
    """The same number for the same ids of every document."""
    import numpy as np

    total = hashlib.sha256()
    for own in ids:
        total.update(np.asarray(own, "<u4").tobytes() + b"|")
    return int(total.hexdigest()[:12], 16)


def rule(name: str, index: int) -> dict[str, Side]:
    return {
        "ours": Side("text", partial(ours_step, name=name)),
        "datatrove": Side("text", partial(datatrove_step, index=index)),
    }


os.environ.setdefault("RAYON_NUM_THREADS", "1")
ROWS: dict[str, dict[str, Side]] = {
    "WARC to clean text": {
        "ours, fast": Side("html", partial(ours_from_archives, extractor=Extractor.fast.value)),
        "ours, best": Side("html", partial(ours_from_archives, extractor=Extractor.best.value)),
        "datatrove": Side("html", datatrove_from_archives),
    },
    "language": rule("language", 1),
    "gopher_repetition": rule("gopher_repetition", 2),
    "gopher_quality": rule("gopher_quality", 3),
    "c4": rule("c4", 4),
    "fineweb": rule("fineweb", 5),
    "MinHash signatures": {"ours": Side("text", ours_signatures), "datatrove": Side("text", datatrove_signatures)},
    "MinHash whole": {"ours": Side("text", ours_minhash), "datatrove": Side("text", datatrove_whole_minhash)},
    "tokenize": {"ours": Side("text", ours_tokens), "tiktoken": Side("text", tiktoken_tokens)},
}
