"""Entry: train, encode, decode. A vocabulary is one `tokenizer.json`, whatever its origin.

    python -m data_pipeline.bpe train corpus=pydocs vocab_size=2048 output=vocab
    python -m data_pipeline.bpe encode tokenizer=gpt2 text='Hello world'       -> [15496, 995]
    python -m data_pipeline.bpe decode tokenizer=gpt2 'ids=[15496, 995]'       -> Hello world

Ids equal tiktoken's. fastokens encodes byte-level vocabularies if it is installed, else tokenizers: the same ids, 30
times slower. A special token is never made from a document's text.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from conf.errors import UserError, of_nature
from data_pipeline.manifest import TOKENIZER
from data_pipeline.shards.shards_config import BpeCodeConfig, BpeTrainConfig
from data_pipeline.tokenizer.tokenizer import Tokenizer, train_bpe


def train(cfg: BpeTrainConfig) -> None:
    """Train a vocabulary on a corpus; refuses to replace another one."""
    from data_pipeline.corpus.read import documents
    from data_pipeline.corpus.report import Report

    report = Report()
    tokenizer = train_bpe((d.text for d in documents(cfg.corpus, report)), cfg.vocab_size)
    path = Path(cfg.output) / TOKENIZER
    try:
        if path.exists() and path.read_bytes() != tokenizer.raw:
            raise UserError(
                f"{path} holds another vocabulary, which shards may have been made with: give another output="
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        tokenizer.save(path.parent)
    except OSError as e:
        raise of_nature(e, f"output={cfg.output}: {e.strerror}: give a folder that can be written") from None
    report.print()
    print(f"{path}: {tokenizer.vocab_size:,} tokens, sha256 {tokenizer.sha256}")


def encode(cfg: BpeCodeConfig) -> None:
    """Print the ids of a text as JSON."""
    print(json.dumps(Tokenizer.load(cfg.tokenizer).encode(_stdin() if cfg.text is None else cfg.text)))


def decode(cfg: BpeCodeConfig) -> None:
    """Print the text of ids."""
    print(Tokenizer.load(cfg.tokenizer).decode(_ids(_stdin()) if cfg.ids is None else cfg.ids))


def _ids(line: str) -> list[int]:
    try:
        ids = json.loads(line)
    except ValueError:
        ids = None
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise UserError(
            "standard input is not one JSON list of ids: give ids=[15496,995], or that list on standard input"
        )
    return ids


def _stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as e:
        raise UserError(f"standard input is not UTF-8 (byte {e.start}): give UTF-8 text") from None


if __name__ == "__main__":
    from conf.schema import run_one_of

    run_one_of({"train": (BpeTrainConfig, train), "encode": (BpeCodeConfig, encode), "decode": (BpeCodeConfig, decode)})
