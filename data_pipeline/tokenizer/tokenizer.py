"""Byte-pair encoding: text to token ids and back, and the training of a vocabulary."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from conf.errors import UserError
from data_pipeline.files import publish
from data_pipeline.manifest import TOKENIZER
from data_pipeline.tokenizer.vocabularies import (
    BYTE_LEVEL,
    EOT,
    GPT1_FILES,
    GPT2_FILES,
    byte_level,
    find_gpt2_file,
    gpt1,
    gpt2,
)


class Tokenizer:
    """A vocabulary and its encoder. `raw` is the bytes of `tokenizer.json`; their hash identifies the vocabulary."""

    def __init__(self, raw: bytes, name: str = TOKENIZER) -> None:
        self.raw = raw
        self.sha256 = hashlib.sha256(raw).hexdigest()
        try:
            self._body = json.loads(raw)
            added = {t["content"]: t["id"] for t in self._body["added_tokens"]}
            self._plain = [t for t in self._body["added_tokens"] if not t["special"]]  # a special token is no text
            ids = {**self._body["model"]["vocab"], **added}
            if not all(type(i) is int and i >= 0 for i in ids.values()):
                raise ValueError("an id that is not a number")
            self.vocab_size: int = max(ids.values()) + 1
            self.eot_id: int | None = ids.get(EOT)
            self.unk_id: int | None = ids.get(self._body["model"].get("unk_token"))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
            raise UserError(f"{name}: not a tokenizer.json of Hugging Face's tokenizers ({e!r})") from None
        self.name = name

    @classmethod
    def load(cls, source: str | Path) -> Tokenizer:
        """The tokenizer of `"gpt2"`, a tokenizer.json, or a folder with one, with GPT-2's two files or with GPT-1's.

        Raises:
            UserError: none of these, or a damaged file.
        """
        if str(source) == "gpt2":
            return cls(gpt2(find_gpt2_file))
        path = Path(source)
        if path.is_file():
            return cls(path.read_bytes(), str(path))
        if (path / TOKENIZER).is_file():
            return cls((path / TOKENIZER).read_bytes(), str(path / TOKENIZER))
        if all((path / name).is_file() for name in GPT2_FILES):
            return cls(gpt2(lambda name: (path / name).read_bytes()))
        if all((path / name).is_file() for name in GPT1_FILES):
            return cls(gpt1(*((path / name).read_bytes() for name in GPT1_FILES)))
        raise UserError(
            f"tokenizer={source}: no vocabulary there: give tokenizer=gpt2, a tokenizer.json, or a folder that holds "
            f"one, or {' and '.join(GPT2_FILES)}, or {' and '.join(GPT1_FILES)}"
        )

    def save(self, folder: Path) -> None:
        """Publish `tokenizer.json` in `folder`, atomically."""
        publish(folder / TOKENIZER, self.raw)

    def token(self, id_: int) -> str:
        """The token of an id, as the vocabulary writes it; KeyError if there is none."""
        ids = {**self._body["model"]["vocab"], **{t["content"]: t["id"] for t in self._body["added_tokens"]}}
        return {i: name for name, i in ids.items()}[id_]

    def with_special(self, ids: Mapping[str, int]) -> Tokenizer:
        """This vocabulary, which also knows these special tokens; itself if it knows them."""
        new = {token: id_ for token, id_ in ids.items() if token not in self.special_ids}
        if not new:
            return self
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        added = [{"id": id_, "content": token, **plain} for token, id_ in new.items()]
        body = {**self._body, "added_tokens": [*self._body["added_tokens"], *added]}
        return Tokenizer(json.dumps(body, ensure_ascii=False).encode(), self.name)

    @property
    def byte_level(self) -> bool:
        """Byte-level BPE with GPT-2's pattern: the kind for which tests prove fastokens' ids."""
        body = self._body
        plain_bpe = body["model"].get("type") == "BPE" and not body.get("normalizer")
        return plain_bpe and body.get("pre_tokenizer") == BYTE_LEVEL

    @cached_property
    def engine(self) -> str:
        """The library that encodes."""
        for name in ("fastokens", "tokenizers") if self.byte_level else ("tokenizers",):
            if importlib.util.find_spec(name):
                return name
        raise UserError("encoding text needs the tokenizers package: pip install 'gradus[data]'")

    @cached_property
    def _encode(self) -> Callable[[list[str]], list[np.ndarray]]:
        encode = self._encoder(self._plain)
        if self.eot_id is not None and self.eot_id in encode([EOT])[0]:
            raise UserError(
                f"this vocabulary makes {EOT} from plain text: its merges or pattern are not those of a GPT"
            )
        return encode

    @cached_property
    def _encode_special(self) -> Callable[[list[str]], list[np.ndarray]]:
        return self._encoder(self._body["added_tokens"])

    def _encoder(self, added_tokens: list[Any]) -> Callable[[list[str]], list[np.ndarray]]:
        """The library's encoder that knows these added tokens, and adds none by itself."""
        own = {"added_tokens": added_tokens, "post_processor": None, "truncation": None, "padding": None}
        library = _fastokens if self.engine == "fastokens" else _tokenizers
        return self._opened(library, json.dumps({**self._body, **own}))

    @cached_property
    def _decode(self) -> Callable[[list[int]], str]:
        if self.engine == "fastokens":
            import fastokens

            return self._opened(fastokens.Tokenizer.from_json_str, self.raw.decode()).decode
        import tokenizers

        decoder = self._opened(tokenizers.Tokenizer.from_str, self.raw.decode())
        return lambda ids: decoder.decode(ids, skip_special_tokens=False)

    def _opened(self, library: Callable[[str], Any], tokenizer_json: str) -> Any:
        try:
            return library(tokenizer_json)
        except Exception as e:  # the libraries raise plain ones
            raise UserError(f"{self.name}: {self.engine} cannot use this vocabulary ({e}): make it anew") from None

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of a text, as `encode_batch`; with `special` the text of a special token is that token, not letters."""
        return (self._checked(self._encode_special, [text]) if special else self.encode_batch([text]))[0].tolist()

    @property
    def special_ids(self) -> dict[str, int]:
        """The id of each special token."""
        return {t["content"]: t["id"] for t in self._body["added_tokens"] if t["special"]}

    def special_in(self, text: str) -> list[str]:
        """The special tokens whose text occurs in `text`."""
        return [t["content"] for t in self._body["added_tokens"] if t["special"] and t["content"] in text]

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Ids [n] uint32 of each text, without an end-of-text token.

        Raises:
            UserError: a text that is not Unicode.
        """
        return self._checked(self._encode, texts)

    @staticmethod
    def _checked(encode: Callable[[list[str]], list[np.ndarray]], texts: list[str]) -> list[np.ndarray]:
        try:
            return encode(texts)
        except UnicodeEncodeError as e:
            raise UserError(f"the text is not Unicode ({e.reason} at character {e.start}): give UTF-8") from None

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; bytes that are not UTF-8 on their own become U+FFFD.

        Raises:
            UserError: an id that the vocabulary does not have.
        """
        unknown = [i for i in ids if not 0 <= i < self.vocab_size]
        if unknown:
            raise UserError(f"ids={unknown[:3]}: this vocabulary has the ids 0 to {self.vocab_size - 1}")
        return self._decode(list(ids))


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with GPT-2's pattern: 256 bytes, then merges by frequency, `<|endoftext|>` as the last id.

    Raises:
        UserError: the texts hold too few different pieces for `vocab_size`.
    """
    try:
        from tokenizers import Tokenizer as Trained
        from tokenizers import models, pre_tokenizers, trainers
    except ImportError:
        raise UserError("training a vocabulary needs the tokenizers package: pip install 'gradus[data]'") from None
    learner = Trained(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=sys.stderr.isatty()
    )
    learner.train_from_iterator(texts, trainer)
    model = json.loads(learner.to_str())["model"]
    if len(model["vocab"]) + 1 != vocab_size:
        raise UserError(
            f"vocab_size={vocab_size}: this corpus gives only {len(model['vocab']) + 1} different tokens: "
            f"give vocab_size={len(model['vocab']) + 1}, or a larger corpus"
        )
    return Tokenizer(byte_level({**model["vocab"], EOT: vocab_size - 1}, [tuple(m) for m in model["merges"]]))


def _fastokens(tokenizer_json: str) -> Callable[[list[str]], list[np.ndarray]]:
    import fastokens

    tokenizer = fastokens.Tokenizer.from_json_str(tokenizer_json)

    def encode(texts: list[str]) -> list[np.ndarray]:
        flat, offsets = tokenizer.encode_batch_flat(texts)
        ids, ends = np.frombuffer(flat, "<u4"), np.frombuffer(offsets, "<u8").tolist()
        return [ids[a:b] for a, b in pairwise(ends)]

    return encode


def _tokenizers(tokenizer_json: str) -> Callable[[list[str]], list[np.ndarray]]:
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
    return lambda texts: [
        np.array(e.ids, np.uint32) for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    ]
