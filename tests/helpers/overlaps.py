"""Tasks and training shards with planted overlaps, and the dirty questions by plain Python."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from data_pipeline.corpus.corpus_config import CorpusConfig, CorpusFormat
from data_pipeline.shards.shards_config import ShardsConfig
from data_pipeline.shards.write import write
from data_pipeline.tokenizer.tokenizer import train_bpe
from tests.helpers.evaluation_data import write_rows
from tests.helpers.plain_words import plain_words
from trainer.evaluation.evaluation import Plan, plan_task
from trainer.evaluation.tasks.find import load_task

Row = dict[str, Any]


def vocabulary(rng: random.Random, n: int, first: str) -> list[str]:
    return [first + "".join(rng.choices("abcdefghij", k=rng.randint(3, 7))) for _ in range(n)]


def variant(rng: random.Random, word: str) -> str:
    """The same word to the n-grams: other case, punctuation in it and behind it."""
    word = rng.choice((str.upper, str.title, str.lower))(word)
    return rng.choice((word, f"{word[:2]}-{word[2:]}", f"{word[:-1]}'{word[-1:]}", f"“{word},”"))


def grams(text: str, n: int) -> set[tuple[str, ...]]:
    words = [word for word, _, _ in plain_words(text, bare=True)]
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


class Planted:
    """A task of each kind and one of a program, in `folder`, and documents that hold parts of their questions.

    A third of the questions has n words of theirs in a document, a third n - 1 words in one, or n across two.
    """

    def __init__(self, folder: Path, seed: int, questions: int = 30) -> None:
        self.folder, self._rng = folder, random.Random(seed)
        self._theirs, self._ours = vocabulary(self._rng, 4000, "k"), vocabulary(self._rng, 2000, "")
        lengths = {"choose": (3, 12), "complete": (20, 40), "write": (6, 12), "sums": (1, 4)}
        self.rows = {
            name: [
                {"q": self._text(*some), "a": self._text(2, 3), "b": self._text(2, 3), "right": self._rng.randrange(2)}
                for _ in range(questions)
            ]
            for name, some in lengths.items()
        }
        self.rows["count"] = self.rows["complete"][: questions // 2]
        for name, rows in self.rows.items():
            write_rows(folder / f"{name}.jsonl", rows)
            (folder / f"{name}.yaml").write_text(json.dumps(self._described(name)), encoding="utf-8")
        self.names = {name: str(folder / f"{name}.yaml") for name in self.rows}
        self.n = {name: self._percentile(name) for name in self.rows}
        self.documents = self._documents()
        self.tokenizer = train_bpe(self.documents, 500)
        self.tokenizer.save(folder)

    def text_of(self, name: str, row: Row) -> str:
        """The question with its right answer."""
        if name in ("choose", "sums"):
            return f"Is it so: {row['q']}? {row['ab'[row['right']]]}"
        return str(row["q"]) if name == "count" else f"{row['q']}. {row['a']}"

    def dirty(self, name: str) -> list[bool]:
        seen = set().union(*(grams(text, self.n[name]) for text in self.documents))
        return [bool(grams(self.text_of(name, row), self.n[name]) & seen) for row in self.rows[name]]

    def plans(self, *names: str) -> list[Plan]:
        chosen = [self.names[name] for name in names or self.names]
        return [plan_task(n, load_task(n), str(self.folder), shots=0, limit=None, seed=0) for n in chosen]

    def write(self, *outputs: Path) -> None:
        """The documents as the shards of one or more sources, neighbours in one."""
        share = -(-len(self.documents) // len(outputs))
        for i, output in enumerate(outputs):
            output.mkdir(parents=True)
            part = self.documents[i * share : (i + 1) * share]
            path = write_rows(output / "documents.jsonl", [{"text": text} for text in part])
            corpus = CorpusConfig(name="jsonl", format=CorpusFormat.jsonl, path=str(path))
            how: dict[str, Any] = {"val_fraction": 0.0, "shard_tokens": 4000, "block_tokens": 600, "workers": 1}
            write(ShardsConfig(corpus=corpus, tokenizer=str(self.folder), output=str(output / "shards"), **how))

    def _text(self, low: int, high: int) -> str:
        return " ".join(self._rng.choices(self._theirs, k=self._rng.randint(low, high)))

    def _filler(self) -> str:
        return " ".join(self._rng.choices(self._ours, k=self._rng.randint(20, 60)))

    def _percentile(self, name: str) -> int:
        lengths = sorted(len(plain_words(self.text_of(name, row), bare=True)) for row in self.rows[name])
        return min(13, max(1 if name == "sums" else 8, lengths[int(0.05 * (len(lengths) - 1))]))

    def _documents(self) -> list[str]:
        documents = [self._filler() for _ in range(5)]
        for name, rows in self.rows.items():
            for i, row in enumerate(rows):
                words = self.text_of(name, row).split()
                n = self.n[name]
                start = self._rng.randrange(max(1, len(words) - n + 1))
                part = [variant(self._rng, word) for word in words[start : start + n]]
                if i % 3 == 0:
                    documents.append(f"{self._filler()} {' '.join(part)}\n{self._filler()}")
                elif i % 3 == 1 and i % 2:
                    documents.append(f"{self._filler()} {' '.join(part[: n - 1])} {self._filler()}")
                elif i % 3 == 1 and len(part) > 1:
                    cut = self._rng.randrange(1, len(part))
                    documents += [
                        f"{self._filler()} {' '.join(part[:cut])}",
                        f"{' '.join(part[cut:])} {self._filler()}",
                    ]
        return documents

    def _described(self, name: str) -> Row:
        data = {"files": {f"{name}.jsonl": None}, "format": "jsonl"}
        kinds: dict[str, Row] = {
            "choose": {
                "choices": {"context": "Is it so: {{ q }}?", "options": ["{{ a }}", "{{ b }}"], "correct": "right"}
            },
            "complete": {"completion": {"context": "{{ q }}.", "continuation": " {{ a }}"}},
            "write": {
                "generation": {"context": "{{ q }}.", "answers": "[a]", "metric": "exact_match", "max_new_tokens": 4}
            },
            "count": {"perplexity": {"unit": "words", "text": "{{ q }}"}},
        }
        kinds["sums"] = {**kinds["choose"], "synthetic": True}
        return {"about": "x", "data": data, **kinds[name]}
