"""Where a new run's weights come from when `init_from` names a checkpoint: checked before torch is imported."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from conf.errors import UserError
from data_pipeline.manifest import TOKENIZER
from trainer.checkpoint.find import check_model, find_checkpoint, model_of
from trainer.config.pretrain import PretrainConfig
from trainer.data.sources import Sources
from trainer.run.folder import RunFolder


def check_init_from(cfg: PretrainConfig, sources: Sources) -> None:
    """Nothing where the run starts from nothing; dropout and init_std may be others than the checkpoint's.

    Raises:
        UserError: no checkpoint there, one of another shape, or one whose tokens are not those of the data.
    """
    if cfg.init_from is None:
        return
    path = find_checkpoint(cfg.init_from, "init_from")
    check_model(path, model_of(path, RunFolder.state(path)), cfg.model, "another init_from")
    theirs, ours = path / TOKENIZER, sources.any.root / TOKENIZER
    if theirs.is_file() and not same_vocabulary(theirs, ours):
        raise UserError(
            f"init_from={cfg.init_from}: {theirs} is another vocabulary than the data's {ours}: its weights know other "
            f"tokens; write the shards with tokenizer={theirs}"
        )


def same_vocabulary(a: Path, b: Path) -> bool:
    """Whether two tokenizer.json make the same ids of every text: the same bytes, or the same parts that decide."""
    raw_a, raw_b = a.read_bytes(), b.read_bytes()
    if hashlib.sha256(raw_a).digest() == hashlib.sha256(raw_b).digest():
        return True
    try:
        return _parts(raw_a) == _parts(raw_b)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return False


def _parts(raw: bytes) -> dict[str, Any]:
    """What decides on ids, in one way of writing: files of several years and libraries say the same differently."""
    body = json.loads(raw)
    model, added = body["model"], body["added_tokens"]
    merges = [m.split(" ") if isinstance(m, str) else list(m) for m in model["merges"]]
    ids = {**model["vocab"], **{token["content"]: token["id"] for token in added}}
    kind = {key: model.get(key) or None for key in ("unk_token", "continuing_subword_prefix", "end_of_word_suffix")}
    return {
        "ids": ids,
        "merges": merges,
        "kind": {**kind, "type": model.get("type", "BPE"), "byte_fallback": bool(model.get("byte_fallback"))},
        "ignore_merges": bool(model.get("ignore_merges")),
        "special": sorted(token["content"] for token in added if token["special"]),
        "normalizer": body.get("normalizer"),
        "pre_tokenizer": _pre_tokenizer(body.get("pre_tokenizer")),
    }


def _pre_tokenizer(body: Any) -> Any:
    """ByteLevel's offsets are not its ids, and a regex is what it has when nothing is said."""
    if not isinstance(body, dict) or body.get("type") != "ByteLevel":
        return body
    return {"use_regex": True, **{key: value for key, value in body.items() if key != "trim_offsets"}}
