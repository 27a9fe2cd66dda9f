"""The evaluation sets of a recipe, read from files.

An example is a line of JSON, its fields `text_keys` joined by a line break (a list of strings by spaces), or a
paragraph of a .txt file; blank lines part paragraphs. Two kinds of n-grams are searched. Those of `cfg.ngram` words of
all sets are cut out of documents (decontaminate.py); those of `EvaluationSet.n` words say which examples are dirty.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np

from conf.errors import UserError, of_nature
from data_pipeline.corpus.document import field_of
from data_pipeline.corpus.inputs import Input, files_at
from data_pipeline.corpus.kinds import LINES, TEXT, charset_of, kind_of
from data_pipeline.corpus.lines import content
from data_pipeline.corpus.read import MAX_FILE, head_of
from data_pipeline.prepare.recipe_config import DecontaminateConfig
from data_pipeline.text.grams import EvaluationSet, Grams, inside
from data_pipeline.text.hashing import WordForm, hashes

_PARAGRAPHS = re.compile(r"\n[^\S\n]*\n")


def load_grams(cfg: DecontaminateConfig) -> Grams:
    """Raises UserError: no such file, one that is no evaluation set, or one without any of `text_keys`."""
    sets, removed = [], [np.empty(0, np.uint64)]
    for file in [file for path in cfg.sets for file in _files(path)]:
        texts = _examples(file, cfg)
        found = EvaluationSet.of_texts(str(file.path), texts)
        if not found.lengths.any():
            raise UserError(f"decontaminate.sets: no word in {file.path}: leave it out")
        sets.append(found)
        removed.append(inside(*hashes(texts, WordForm.bare), cfg.ngram)[0])
    return Grams(sets, {cfg.ngram: np.concatenate(removed)})


def _files(path: str) -> list[Input]:
    files = files_at(path, "decontaminate.sets")
    if not files:
        raise UserError(f"decontaminate.sets={path}: no file there: name a file, a folder or a glob with files")
    for file in files:
        kind = kind_of(head_of(file), file.name)
        if kind != LINES and (kind != TEXT or ".txt" not in file.path.suffixes):
            raise UserError(
                f"decontaminate.sets: {file.path} is {'no .txt' if kind == TEXT else kind}: give .txt files and JSON "
                f"lines; a glob chooses among others"
            )
    return files


def _examples(file: Input, cfg: DecontaminateConfig) -> list[str]:
    """The texts of a set; "" for an example that has none of `text_keys`."""
    try:
        text = _read(file.path)
        if kind_of(head_of(file), file.name) == TEXT:
            return [part for part in _PARAGRAPHS.split(text) if part.strip()]
        bodies = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (OSError, ValueError, RecursionError) as e:
        message = f"decontaminate.sets: {file.path}: cannot be read ({e}): give JSON lines or UTF-8 text"
        raise of_nature(e, message) from None
    texts = [_text(body, cfg.text_keys) for body in bodies]
    if not any(texts):
        seen = sorted(bodies[0]) if bodies and isinstance(bodies[0], dict) else "no JSON object"
        raise UserError(f"decontaminate.text_keys={cfg.text_keys}: none is in {file.path}, which has {seen}")
    return texts


def _read(path: Path) -> str:
    held = bytearray()
    with path.open("rb") as raw:
        for chunk in content(raw, path.name):
            held += chunk
            if len(held) > MAX_FILE:
                raise ValueError(f"more than {MAX_FILE:,} bytes")
    return held.decode(charset_of(held)).removeprefix("\ufeff").replace("\r\n", "\n")


def _text(body: object, keys: list[str]) -> str:
    values = [field_of(body, key) for key in keys]
    lines = [" ".join(v) if isinstance(v, list) and all(isinstance(x, str) for x in v) else v for v in values]
    return "\n".join(line for line in lines if isinstance(line, str))
